"""Gradient checkpointing: activations are recomputed in the backward pass instead of kept.

MLX: `mx.checkpoint` calls its function a second time, and dropout would draw another mask, so that loss and
gradient belong to different masks. Here the random key is an argument of the function, the same both times.
So are the trained parameters, because only arguments get gradients.
Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
Differs from reference/recompute.py: PyTorch's `checkpoint` restores its random state, and finds the trained
parameters, by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

_keys: list[mx.array] = []  # the current key of each open `random_keys_from` block


def recomputed(layer: nn.Module, x_BTD: mx.array, *others: object) -> mx.array:
    """layer(x, *others); only x is kept for the backward pass."""
    parameters = layer.trainable_parameters()

    @mx.checkpoint
    def run(trained: dict, key: mx.array, x_BTD: mx.array) -> mx.array:
        layer.update(trained)
        with random_keys_from(key):
            y_BTD = layer(x_BTD, *others)
        layer.update(parameters)  # the real arrays again: inside, the layer held tracers
        return y_BTD

    return run(parameters, new_key(), x_BTD)


@contextmanager
def random_keys_from(key: mx.array) -> Iterator[None]:
    """Within the block `next_key` gives the keys that follow from this one."""
    _keys.append(mx.stop_gradient(key))
    try:
        yield
    finally:
        _keys.pop()


def next_key() -> mx.array | None:
    """The key for one random draw; None, outside such a block, means MLX's own random state."""
    if not _keys:
        return None
    _keys[-1], key = mx.random.split(_keys[-1])
    return key


def new_key() -> mx.array:
    """A key drawn from MLX's random state."""
    return mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
