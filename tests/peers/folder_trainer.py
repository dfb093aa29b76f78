"""Compare `load_model` on a folder, with an adapter, with transformers and PEFT on the same folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten

from mlx_impl import load_model
from mlx_impl.config import LoRAConfig
from mlx_impl.data import Batch, Example, make_batch
from mlx_impl.fast.decode import generate_all
from mlx_impl.fast.forward import FAST
from mlx_impl.generate import generate
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from tests.derived import assert_within_rounding
from tests.peers.cases import Arrays
from tests.peers.families import FolderTwin, random_factors

NO_STOPS = ()  # no token ends an answer


def batch_of(folder: Path, token_counts: tuple[int, ...] = (14, 6, 11), seed: int = 3) -> Batch:
    """A right-padded batch of rows of unequal length; the first third of each row is the prompt."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(seed)
    examples = [
        Example(tuple(rng.integers(1, vocab_size, n).tolist()), (False,) * (n // 3) + (True,) * (n - n // 3))
        for n in token_counts
    ]
    return make_batch(examples)


def load(
    folder: Path, lora: LoRAConfig | None = None, factors: Arrays | None = None, dequantize: bool = False
) -> CausalLM:
    """The model, with an adapter if `lora` is given; without `factors` they are random."""
    model = load_model(folder, dequantize=dequantize).model if dequantize else load_model(folder).model
    if lora is not None:
        add_lora(model, lora)
        made = {name: array.shape for name, array in tree_flatten(model.trainable_parameters())}
        given = random_factors(made) if factors is None else factors
        assert given.keys() == made.keys()
        model.load_weights([(name, mx.array(value)) for name, value in given.items()], strict=False)
    return model


def logits_and_gradients(model: CausalLM, batch: Batch) -> Arrays:
    """Logits of every position, and by name the gradients of the mean loss over all targets."""
    logits_BTV = model(mx.array(batch.inputs_BT))
    (_, num_targets), grads = nn.value_and_grad(model, FAST.batch_loss)(model, FAST.to_arrays(batch))
    named = {name: np.array(grad / num_targets) for name, grad in tree_flatten(grads)}
    return {"logits": np.array(logits_BTV), **named}


@dataclass(frozen=True)
class Expected:
    """The peer's logits and gradients in both precisions."""

    ref32: Arrays
    ref64: Arrays

    @classmethod
    def of(cls, twin: FolderTwin, batch: Batch, twin32: FolderTwin | None = None) -> Expected:
        ref64 = {"logits": twin.logits(batch.inputs_BT), **twin.gradients(batch)}
        if twin32 is None:
            return cls(ref64, ref64)
        return cls({"logits": twin32.logits(batch.inputs_BT), **twin32.gradients(batch)}, ref64)


def assert_equal_to_peft(
    folder: Path,
    lora: LoRAConfig,
    expected: Expected | None = None,
    weights: Arrays | None = None,
    dequantize: bool = False,
) -> None:
    """Logits and gradients agree within the tolerance; `weights` if PyTorch cannot read the folder."""
    batch = batch_of(folder)
    if expected is None:
        twins = [FolderTwin(folder, lora, dtype=d, weights=weights) for d in (torch.float64, torch.float32)]
        expected = Expected.of(twins[0], batch, twins[1])
    ours = logits_and_gradients(load(folder, lora, dequantize=dequantize), batch)
    assert_within_rounding(folder.name, ours, expected.ref32, expected.ref64, longest_sum(folder, batch))


def longest_sum(folder: Path, batch: Batch) -> int:
    config = json.loads((folder / "config.json").read_text())
    return max(config["vocab_size"], config["intermediate_size"], batch.inputs_BT.size)


def greedy_answers(
    model: CausalLM, prompts: list[list[int]], num_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The answers to all prompts in one batch, and to each prompt alone."""
    together = generate_all(model, prompts, num_tokens, NO_STOPS)
    return together, [list(generate(model, prompt, num_tokens, NO_STOPS)) for prompt in prompts]
