"""A batch of a new shape is traced again, but needs no kernel of its own.

`mx.compile` makes one kernel of operations that it fuses, and a number such as a row's width is part of that
kernel. A GPU takes seconds to compile each. A CPU fuses the same operations, and keeps a source file of every
kernel in the folder for temporary files: so these tests run the GPU's code on a CPU, and count files.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Batch, Example, make_batch, make_packed_batch
from mlx_impl.fast import ops
from mlx_impl.fast.kept_positions import kept_positions
from mlx_impl.fast.unpadding import Unpadding
from mlx_impl.model import CausalLM
from mlx_impl.run.trainer import LoRATrainer
from tests.lora_ladder.cases import SPEC

pytestmark = pytest.mark.usefixtures("on_the_cpu")

NumKernels = Callable[[], int]


@pytest.fixture
def num_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NumKernels:
    """How many fused kernels have been compiled in this test; the first is of a number that is new."""
    if shutil.which("g++") is None:
        pytest.skip("mx.compile compiles nothing without a C++ compiler")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    new = random.SystemRandom().random()  # whatever seeded the others
    mx.eval(mx.compile(lambda x: new * x + 1)(mx.ones(3)))
    assert num_kernels_in(tmp_path) == 1
    return lambda: num_kernels_in(tmp_path)


def num_kernels_in(folder: Path) -> int:
    return len(list(folder.glob("mlx/*/cpu/*.cpp")))


def example(length: int, num_shared: int = 0) -> Example:
    own = np.random.default_rng(length).integers(1, SPEC.vocab_size, length + 1)
    tokens = [*range(1, num_shared + 1), *own.tolist()[num_shared:]]
    return Example(tuple(tokens), tuple(t > length // 2 for t in range(length + 1)))


def rows(*lengths: int) -> Batch:
    return make_batch([example(length) for length in lengths])


def rows_of_one_prompt(*lengths: int) -> Batch:
    return make_batch([example(length, num_shared=min(lengths) // 3) for length in lengths])


def packed(*lengths: int) -> Batch:
    return make_packed_batch([example(length) for length in lengths], [tuple(range(len(lengths)))])


@pytest.mark.parametrize("batch_of", [rows, rows_of_one_prompt])
def test_moving_tokens_compiles_no_kernel_for_another_width(
    batch_of: Callable[..., Batch], num_kernels: NumKernels
) -> None:
    num_before = num_kernels_of_moves(batch_of(200, 311), num_kernels)
    assert num_before > (batch_of is rows_of_one_prompt)  # whose gradients are sums
    assert num_kernels_of_moves(batch_of(177, 397), num_kernels) == num_before


def num_kernels_of_moves(batch: Batch, num_kernels: NumKernels) -> int:
    """After all that `Unpadding` does, and its gradients."""
    kept = kept_positions(batch) or pytest.fail("every position was kept")

    @mx.compile
    def gradient(x_1UO: mx.array, arrays: list[mx.array]) -> mx.array:
        def moved(x_1UO: mx.array) -> mx.array:
            unpadding = Unpadding(*arrays)
            x_1UO = unpadding.gather(unpadding.scatter(x_1UO, H=3))
            return unpadding.at(x_1UO, mx.arange(5)).sum()

        return mx.grad(moved)(x_1UO)

    arrays = [mx.array(array) for array in kept if array is not None]
    mx.eval(gradient(mx.ones((1, len(kept.kept_U), 6)), arrays))
    return num_kernels()


SHORT = (50, 60, 70, 80), (90, 100, 120, 127), (230, 160, 150, 190)
LONG = (500, 510), (900, 700), (1500, 1200)
WINDOW = replace(SPEC, sliding_window=64)
WIDER = replace(SPEC, hidden_size=64, intermediate_size=96, head_dim=32)  # whole groups of quantized weights
KINDS = {
    "plain": (SPEC, LoRAConfig(), rows),
    "one prompt": (SPEC, LoRAConfig(), rows_of_one_prompt),
    "packed": (SPEC, LoRAConfig(), packed),
    "window": (WINDOW, LoRAConfig(), rows),
    "window, long rows": (WINDOW, LoRAConfig(), rows),
    "packed, window": (WINDOW, LoRAConfig(), packed),
    "DoRA": (SPEC, LoRAConfig(use_dora=True), rows),
    "dropout": (SPEC, LoRAConfig(dropout=0.1), rows),
    "quantized": (WIDER, LoRAConfig(), rows),
}


@pytest.mark.nightly  # the first step compiles some 30 kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_compiles_no_kernel_for_another_shape(kind: str, num_kernels: NumKernels) -> None:
    config, lora, batch_of = KINDS[kind]
    model = CausalLM(config)
    model.set_dtype(mx.bfloat16)
    if kind == "quantized":
        nn.quantize(model, 32, 4)
    batches = [batch_of(*lengths) for lengths in (LONG if "long" in kind else SHORT)]
    trainer = LoRATrainer(model, lora, TrainConfig(iters=len(batches)), compiled=True)
    first, *others = [num_kernels() for _ in trainer.fit_windows([batch] for batch in batches)]
    assert others == [first] * len(others)
