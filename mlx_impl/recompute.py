"""Gradient checkpointing: activations are recomputed in the backward pass instead of kept.

MLX: `mx.checkpoint` calls its function a second time, and dropout would draw another mask, so that loss and
gradient belong to different masks. Here the random state is an argument of the function, the same both times.
So are the trained parameters, because only arguments get gradients. The masks are those of a run without
checkpointing.
Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
Differs from reference/recompute.py: PyTorch's `checkpoint` restores its random state, and finds the trained
parameters, by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_keys: list[RandomKeys] = []  # of each open `following` block


def recomputed(layer: nn.Module, x_BTD: mx.array, *others: object) -> mx.array:
    """layer(x, *others); only x is kept for the backward pass."""
    parameters = layer.trainable_parameters()
    keys = RandomKeys()

    @mx.checkpoint
    def run(trained: dict, state: mx.array, x_BTD: mx.array) -> mx.array:
        layer.update(trained)
        with keys.following(state):
            y_BTD = layer(x_BTD, *others)
        layer.update(parameters)  # the real arrays again: inside, the layer held tracers
        return y_BTD

    y_BTD = run(parameters, random_state(), x_BTD)
    keys.pass_on()
    return y_BTD


class RandomKeys:
    """The keys that MLX would derive from its random state, derived from a state that is given."""

    def __init__(self) -> None:
        self.num_drawn = 0

    @contextmanager
    def following(self, state: mx.array) -> Iterator[None]:
        """Within the block `next_key` gives the keys that follow from this state."""
        self.state, self.num_drawn = mx.stop_gradient(state), 0
        _keys.append(self)
        try:
            yield
        finally:
            _keys.pop()
            del self.state  # a tracer: kept, it would tie the compiled step to itself, and never be freed

    def next(self) -> mx.array:
        self.num_drawn += 1
        self.state, key = mx.random.split(self.state)
        return key

    def pass_on(self) -> None:
        """Move MLX's own state as far as if it had given these keys; the numbers are never computed."""
        for _ in range(self.num_drawn):
            mx.random.uniform()


def random_state() -> mx.array:
    """MLX's own, from which it derives a key for each draw."""
    state: Any = mx.random.state
    return state[0]


def next_key() -> mx.array | None:
    """The key for one random draw; None, outside such a block, means MLX's own random state."""
    return _keys[-1].next() if _keys else None
