"""The comparison with PEFT fails for each of eight bugs planted in the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import reference.lora
import reference.model
import reference.ops
import reference.optim
import reference.train
from mlx_impl.config import LoRAConfig, ModelConfig
from tests.peers.cases import ADAPTERS, LLAMA, MODELS, PLAIN, Oracle
from tests.peers.test_oracle import assert_promise, logits_and_gradients
from tests.peers.test_trajectory import RUNS, theirs_and_ours
from tests.peers.twin import PeftTwin

rope_frequencies, share_of_peak = reference.model.rope_frequencies, reference.optim.share_of_peak
wrap = reference.lora.wrap


def without_rslora(name: str, linear: Any, config: LoRAConfig) -> Any:
    return wrap(name, linear, replace(config, use_rslora=False))


def without_patterns(name: str, linear: Any, config: LoRAConfig) -> Any:
    return wrap(name, linear, replace(config, alpha_pattern={}))


def without_scaling(config: ModelConfig) -> torch.Tensor:
    return rope_frequencies(replace(config, rope_scaling=None))


def with_trained_length(module: Any, x_BTI: torch.Tensor) -> torch.Tensor:
    """DoRA with a norm that is not detached from the gradient."""
    y_BTO = torch.nn.functional.linear(x_BTI, module.merged_weight())
    return y_BTO if module.linear.bias is None else y_BTO + module.linear.bias


BROKEN_MODELS = {
    "rslora-scale": ("reference.lora.wrap", without_rslora, LLAMA, ADAPTERS["rslora"]),
    "alpha-pattern": ("reference.lora.wrap", without_patterns, LLAMA, ADAPTERS["patterns"]),
    "rope-scaling": ("reference.model.rope_frequencies", without_scaling, MODELS["rope-llama3"], PLAIN),
    "dora-norm": ("reference.lora.DoRALinear.forward", with_trained_length, LLAMA, ADAPTERS["dora"]),
    "silu": ("reference.ops.silu", torch.nn.functional.gelu, LLAMA, PLAIN),
}


@pytest.mark.parametrize(("target", "broken", "spec", "lora"), BROKEN_MODELS.values(), ids=BROKEN_MODELS)
def test_a_bug_in_the_model_fails_the_comparison_with_peft(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    broken: Callable[..., Any],
    spec: ModelConfig,
    lora: LoRAConfig,
) -> None:
    monkeypatch.setattr(target, broken)
    ours = logits_and_gradients(Oracle, spec, lora, torch.float64)
    theirs = logits_and_gradients(PeftTwin, spec, lora, torch.float64)
    with pytest.raises(AssertionError, match=r"differs by .* relative"):
        assert_promise("broken", ours, theirs)


def one_late(step: int, config: Any) -> float:
    return share_of_peak(max(0, step - 1), config)


def each_alone(parameters: Any, max_norm: float) -> Any:
    """Clip every tensor by its own norm."""
    norms = [clip_grad_norm_([parameter], max_norm) for parameter in parameters]
    return torch.stack(norms).norm()


BROKEN_RUNS = {
    "schedule": ("reference.train.share_of_peak", one_late, "cosine-warmup"),
    "clipping": ("reference.train.clip_grad_norm_", each_alone, "clipped"),
    "optimizer": ("reference.optim.AdamW", torch.optim.Adam, "weight-decay"),
}


@pytest.mark.parametrize(("target", "broken", "run"), BROKEN_RUNS.values(), ids=BROKEN_RUNS)
def test_a_bug_in_training_fails_the_comparison_with_peft(
    monkeypatch: pytest.MonkeyPatch, target: str, broken: Callable[..., Any], run: str
) -> None:
    monkeypatch.setattr(target, broken)
    theirs, ours = theirs_and_ours(PLAIN, RUNS[run], torch.float64)
    with pytest.raises(AssertionError, match=r"differs by .* relative"):
        assert_promise("broken", ours.arrays(), theirs.arrays())
