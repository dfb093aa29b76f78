"""Gradient checkpointing: a block's activations are computed again in the backward pass instead of kept.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".

MLX: `mx.checkpoint` simply calls its function a second time, so a random number that is drawn inside comes
out differently, and the gradient is that of another dropout mask than the loss. Here a block's randomness
starts from a key that is an argument of the function, and is the same both times.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

_keys: list[mx.array] = []  # what the block being computed draws its randomness from


def recomputed(block: nn.Module, x_BTD: mx.array, *others: object) -> mx.array:
    """block(x, *others), of which only x is kept for the backward pass."""
    parameters = block.trainable_parameters()

    def run(trained: dict, key: mx.array, x_BTD: mx.array) -> mx.array:
        block.update(trained)  # so that they are inputs, and get gradients
        _keys.append(mx.stop_gradient(key))
        try:
            return block(x_BTD, *others)
        finally:
            _keys.pop()
            block.update(parameters)

    names, arrays = zip(*tree_flatten(parameters), strict=True) if parameters else ((), ())

    def again(*inputs: mx.array) -> mx.array:
        return run(tree_unflatten(list(zip(names, inputs[2:], strict=True))), *inputs[:2])

    forget = mx.custom_function(again)

    @forget.vjp  # type: ignore[untyped-decorator]
    def recompute(inputs: tuple, d_BTD: mx.array, _: mx.array) -> list[mx.array]:
        """Not before the gradient has come this far: MLX would else compute every block again at once."""
        dkey, dx_BTD, *d_arrays = mx.vjp(again, mx.depends(list(inputs), [d_BTD]), [d_BTD])[1]
        return [dkey, *mx.depends([dx_BTD], d_arrays), *d_arrays]

    key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
    return forget(key, x_BTD, *arrays)


def random_key() -> mx.array | None:
    """A new key for one draw: of the block being recomputed, else None, which is MLX's global state."""
    if not _keys:
        return None
    _keys[-1], key = mx.random.split(_keys[-1])
    return key
