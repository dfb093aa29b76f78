"""Rung 12, state: a saved run is resumed on its own base, with its own adapter and settings, and on no other.

Factors and moments are numbers about one function. With another base, scale or schedule of the same shapes
nothing would fail, and the run would go on to another result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import RopeScaling, TrainConfig
from tests.lora_ladder.cases import Case
from tests.lora_ladder.examples import fitting, to_fit
from tests.lora_ladder.extremes import is_refused
from tests.lora_ladder.judge import Judge

MOVED = (
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "lm_head.weight",
)
# Of the same shapes.
MODELS: dict[str, dict[str, Any]] = {
    "base of RoPE": {"rope_theta": 5000.0},
    "scaling of RoPE": {"rope_scaling": RopeScaling("linear", 4.0)},
    "eps": {"rms_norm_eps": 1e-6},
    "sliding window": {"sliding_window": 4},
    "number of heads": {"num_attention_heads": 30, "num_key_value_heads": 10, "head_dim": 2},
}
LORAS: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 14.0},
    "alpha for some linears": {"alpha_pattern": {"v_proj": 14.0}},
    "scale of rsLoRA": {"use_rslora": True},
    "dropout": {"dropout": 0.25},
}
TRAININGS: dict[str, dict[str, Any]] = {
    "number of updates": {"iters": 8},
    "schedule": {"lr_schedule": "linear"},
    "warmup": {"warmup_steps": 1},
    "weight decay": {"weight_decay": 0.2},
    "clipping": {"max_grad_norm": 0.5},
    "ratio of LoRA+": {"loraplus_lr_ratio": 4.0},
    "batch size": {"batch_size": 3},
    "number of micro-batches": {"grad_accumulation_steps": 1},
    "batching": {"batching": "grouped"},
}
needs_state = pytest.mark.needs("fit", "save", "require_same_run")


def other_bases(case: Case) -> Iterator[tuple[str, Case]]:
    """One number of one array is the next one in float32; or two layers have each other's weights."""
    for name in MOVED:
        moved = case.weights[name].copy()
        moved[(-1,) * moved.ndim] = np.nextafter(moved[(-1,) * moved.ndim], np.float32(np.inf))
        yield f"number in {name}", replace(case, weights={**case.weights, name: moved})
    one, other = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1))
    swapped = {**case.weights, one: case.weights[other], other: case.weights[one]}
    yield "order of the layers' weights", replace(case, weights=swapped)


def require_refused(judge: Judge, folder: Path, what: str, case: Case, training: TrainConfig) -> None:
    __tracebackhide__ = True
    again = partial(case.build(judge.candidate).require_same_run, folder, to_fit(), training)
    judge.claim(is_refused(again), f"a run with another {what} must be refused, and goes on")


def saved_run(case: Case, candidate: Any, folder: Path) -> Path:
    """The state after one update, which the same model and settings may resume."""
    trainer = case.build(candidate)
    trainer.fit(to_fit(), fitting("plain"), 1, ())
    trainer.save(folder)
    case.build(candidate).require_same_run(folder, to_fit(), fitting("plain"))
    return folder


@needs_state
def test_a_run_is_resumed_on_its_own_weights_only(case: Case, judge: Judge, tmp_path: Path) -> None:
    """Not with one number of the base moved by its last bit, nor with two layers swapped."""
    saved = saved_run(case, judge.candidate, tmp_path)
    for what, other in other_bases(case):
        require_refused(judge, saved, what, other, fitting("plain"))


@needs_state
def test_a_run_is_resumed_in_its_own_architecture_only(case: Case, judge: Judge, tmp_path: Path) -> None:
    """The weights are the same, and what is computed with them is not."""
    saved = saved_run(case, judge.candidate, tmp_path)
    for what, fields in MODELS.items():
        other = replace(case, spec=replace(case.spec, **fields))
        require_refused(judge, saved, what, other, fitting("plain"))


@needs_state
def test_a_run_is_resumed_with_its_own_adapter_only(case: Case, judge: Judge, tmp_path: Path) -> None:
    """The factors have the same shapes, and another scale or dropout."""
    saved = saved_run(case, judge.candidate, tmp_path)
    for what, fields in LORAS.items():
        other = replace(case, lora=replace(case.lora, **fields))
        require_refused(judge, saved, what, other, fitting("plain"))


@needs_state
def test_a_run_is_resumed_with_its_own_training_only(case: Case, judge: Judge, tmp_path: Path) -> None:
    """What decides the rates, the updates or the batches that are still to come."""
    saved = saved_run(case, judge.candidate, tmp_path)
    for what, fields in TRAININGS.items():
        require_refused(judge, saved, what, case, replace(fitting("plain"), **fields))
