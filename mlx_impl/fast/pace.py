"""Limits how far MLX queues work ahead of the GPU, because queued work holds memory.

MLX queues up to ten graphs of kernels, and what a kernel used is free only when its graph is done: a step
that needs 8 GiB can hold 15. At MLX's memory limit it waits for the GPU instead. Here the limit is what the
step needs, and BLOCKS_AHEAD blocks more: with a lower one the host waits too often, and the GPU has no work.
Source: `eval_impl` in MLX's transforms.cpp (0.32.4).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

import mlx.core as mx

from ..data import Batch, Window
from ..model import CausalLM
from ..train import Sums
from . import ops
from .memory_kept import block_bytes
from .memory_model import state_bytes, training_bytes
from .memory_sizes import Shape, Sizes, sizes_of
from .segments import sub_batches_in

Reduce = Callable[[Iterable[Callable[[], Sums]]], Sums]
BLOCKS_AHEAD = 4  # on an H200 steps take 8% to 16% less than with none, and little more than with many


def paced(windows: Iterable[Window], model: CausalLM, checkpointed: bool) -> Generator[Window]:
    """The same windows, the memory limit set for each; a CPU does not run ahead and needs none."""
    if mx.default_device() != mx.gpu:
        yield from windows
        return
    sizes = sizes_of(model)  # once: it takes longer than a GPU may wait in each step
    before = mx.set_memory_limit(0)
    try:
        for window in windows:
            needed = max(step_bytes(sizes, batch, checkpointed) for batch in window)
            mx.set_memory_limit(min(before, other_bytes(sizes) + needed))
            yield window
    finally:
        mx.set_memory_limit(before)


def queued(reduce: Reduce) -> Reduce:
    """The same sums; a GPU computes them already while the host builds the graph of the update."""

    def reduce_and_queue(parts: Iterable[Callable[[], Sums]]) -> Sums:
        sums = reduce(parts)
        if ops.on_gpu():
            mx.async_eval(sums)  # type: ignore[no-untyped-call]
        return sums

    return reduce_and_queue


def other_bytes(sizes: Sizes) -> int:
    """What is in memory beside the model and its training state: the limit counts it too."""
    return max(0, mx.get_active_memory() - sizes.weights - state_bytes(sizes))


def step_bytes(sizes: Sizes, batch: Batch, checkpointed: bool) -> int:
    """What this batch needs and what may be queued; as if padding were computed too, which is enough."""
    rows, width = batch.inputs_BT.shape
    sub_batches = () if batch.segment_BT is None else tuple(sub_batches_in(batch))
    shape = Shape(rows, width, rows * width, int(batch.mask_BT.sum()), sub_batches=sub_batches)
    return update_bytes(sizes, shape, checkpointed)


def update_bytes(sizes: Sizes, shape: Shape, checkpointed: bool) -> int:
    """`training_bytes`, and on a GPU of what may be queued."""
    queued = 0 if sizes.keeps_scores or sizes.plain else BLOCKS_AHEAD * block_bytes(sizes, shape)
    return training_bytes(sizes, shape, checkpointed) + queued
