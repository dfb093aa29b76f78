"""Gradient checkpointing one block at a time, in the order of the backward pass.

`mlx_impl/recompute.py` says what is computed. With `mx.checkpoint` MLX may recompute every block at once,
because nothing tells it to wait; here each block waits for the gradient of the one above it.
Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..recompute import RandomKeys, random_state


def recomputed(block: nn.Module, forward: Callable[[mx.array], mx.array], x_BTD: mx.array) -> mx.array:
    """forward(x), which uses the block's parameters; of it only x is kept for the backward pass."""
    parameters = block.trainable_parameters()
    flat = dict(tree_flatten(parameters))  # empty in a block without an adapter

    keys = RandomKeys()

    def run(state: mx.array, x_BTD: mx.array, *trained: mx.array) -> mx.array:
        block.update(tree_unflatten(list(zip(flat, trained, strict=True))) or {})
        try:
            with keys.following(state):
                return forward(x_BTD)
        finally:
            block.update(parameters)

    function = mx.custom_function(run)

    @function.vjp
    def recompute(inputs: tuple, d_BTD: mx.array, _: mx.array) -> list[mx.array]:
        waiting = mx.depends(list(inputs[:2]), [d_BTD])  # the input, and the key of the masks
        d_state, dx_BTD, *d_arrays = mx.vjp(run, [*waiting, *inputs[2:]], [d_BTD])[1]
        return [d_state, *mx.depends([dx_BTD], d_arrays), *d_arrays]

    y_BTD = function(random_state(), x_BTD, *flat.values())
    keys.pass_on()
    return y_BTD
