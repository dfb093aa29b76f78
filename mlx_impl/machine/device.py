"""The device that MLX computes on, as people call it."""

from __future__ import annotations

import mlx.core as mx


def device_name() -> str:
    """Such as "CPU, AMD EPYC", "GPU, Apple M3 Max" or "GPU, NVIDIA H200"."""
    kind = "GPU" if mx.default_device() == mx.gpu else "CPU"
    name = mx.device_info(mx.default_device()).get("device_name", "")
    return f"{kind}, {name}" if name else kind
