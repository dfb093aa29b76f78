"""What several files of unit tests need."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """Where MLX knows float64, and where the bytes were counted."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)
