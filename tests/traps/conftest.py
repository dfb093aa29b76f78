"""Every trap runs on the CPU from the same seed. Afterwards the device is restored and the seed reset."""

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def cpu_and_seed() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    yield
    mx.random.seed(0)  # a trap may leave a broken random state behind
    mx.set_default_device(device)
