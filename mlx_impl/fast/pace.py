"""Limits how far MLX queues work ahead of the GPU, because queued work holds memory.

MLX queues up to ten graphs of kernels, and what a kernel used is free only when its graph is done: a step
that needs 8 GiB can hold 13. At MLX's memory limit it waits for the GPU instead. Here the limit is what the
step itself needs, so the GPU does not run dry either. Source: `eval_impl` in MLX's transforms.cpp (0.32.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlx.core as mx

from ..data import Batch, Window
from ..model import CausalLM
from .memory_model import Shape, sizes_of, training_bytes
from .segments import examples_apart


def paced(windows: Iterable[Window], model: CausalLM, checkpointed: bool) -> Iterator[Window]:
    """The same windows, the memory limit set for each; a CPU does not run ahead and needs none."""
    if mx.default_device() != mx.gpu:
        yield from windows
        return
    before = mx.set_memory_limit(0)
    try:
        for window in windows:
            needed = max(step_bytes(model, batch, checkpointed) for batch in window)
            mx.set_memory_limit(min(before, needed))
            yield window
    finally:
        mx.set_memory_limit(before)


def step_bytes(model: CausalLM, batch: Batch, checkpointed: bool) -> int:
    """As of a batch whose padding is computed too: enough for one whose padding is not."""
    rows, width = batch.inputs_BT.shape
    groups = () if batch.segment_BT is None else tuple(examples_apart(batch)[1])
    shape = Shape(rows, width, rows * width, int(batch.mask_BT.sum()), groups=groups)
    return training_bytes(sizes_of(model), shape, checkpointed)
