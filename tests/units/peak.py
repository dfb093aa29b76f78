"""How much memory a computation needs, in bytes, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.data import Batch
from mlx_impl.fast.forward import FAST
from mlx_impl.model import CausalLM


def peak_bytes(function: Callable, *inputs: Any) -> int:
    """The most that is held at once beyond what was held before, on MLX's default device.

    MLX hands the device work ahead of what it has done, and all of that holds memory; at a memory limit it
    waits instead, so that the peak is that of the graph and not that of the hour.
    """
    mx.eval(function(*inputs))  # a compiler's constants are held from here on
    mx.synchronize()
    limit = mx.set_memory_limit(0)
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(function(*inputs))
        mx.synchronize()
        return mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)


def most_of_a_gradient(model: CausalLM, batch: Batch) -> int:
    """The most that loss and gradients hold in five times, as they run: how far MLX works ahead differs."""
    arrays = FAST.to_arrays(batch)
    mx.eval([a for a in arrays if isinstance(a, mx.array)])
    before, peaks = mx.get_active_memory(), []
    for _ in range(5):
        mx.synchronize()
        mx.reset_peak_memory()
        mx.eval(nn.value_and_grad(model, FAST.batch_loss)(model, arrays))
        peaks.append(mx.get_peak_memory() - before)
    return max(peaks)
