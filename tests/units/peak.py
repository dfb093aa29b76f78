"""How much memory a computation needs, in bytes, the same each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


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
