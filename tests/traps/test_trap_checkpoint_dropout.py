"""Gradient checkpointing runs the forward pass twice, and the second run draws other random numbers.

PyTorch's `checkpoint` saves and restores the random state (`preserve_rng_state`). `mx.checkpoint` calls its
function again in the backward pass, with MLX's global random state of that moment. So the dropout mask of the
gradient differs from that of the loss: nothing fails, and the gradient is that of another function. The right
form passes a random key as an argument, which is the same both times; `mlx_impl/recompute.py` does that.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.lora import Dropout
from mlx_impl.recompute import recomputed

X = mx.arange(1.0, 65.0)


def dropped_sum(w: mx.array, key: mx.array | None = None) -> mx.array:
    """w times the sum of the kept elements. It is linear in w, so at w = 1 value and gradient are equal."""
    return w * (X * mx.random.bernoulli(0.5, X.shape, key)).sum()


class DroppedSum(nn.Module):
    """The same function as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.w = mx.array(1.0)
        self.dropout = Dropout(0.5)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w * self.dropout(x)


def test_wrong_the_gradient_is_that_of_another_mask() -> None:
    mx.random.seed(0)
    value, gradient = mx.value_and_grad(mx.checkpoint(dropped_sum))(mx.array(1.0))
    assert value.item() != gradient.item()


def test_wrong_the_helper_of_mlx_nn_does_the_same() -> None:
    block = DroppedSum()
    mx.random.seed(0)
    run = nn.utils.checkpoint(block)
    value, gradients = nn.value_and_grad(block, lambda x: run(x).sum())(X)
    assert value.item() != gradients["w"].item()


def test_right_without_checkpointing_both_are_one_number() -> None:
    """The control."""
    mx.random.seed(0)
    value, gradient = mx.value_and_grad(dropped_sum)(mx.array(1.0))
    assert value.item() == gradient.item()


def test_right_a_key_that_is_an_argument_is_the_same_both_times() -> None:
    mx.random.seed(0)
    key = mx.random.key(7)
    checkpointed = mx.checkpoint(lambda w, key: dropped_sum(w, mx.stop_gradient(key)))
    value, gradient = mx.value_and_grad(checkpointed)(mx.array(1.0), key)
    assert value.item() == gradient.item()


def test_right_a_recomputed_block_has_the_gradient_of_its_own_mask() -> None:
    """And each call draws a new mask."""
    block, values = DroppedSum(), []
    mx.random.seed(0)
    for _ in range(3):
        value, gradients = nn.value_and_grad(block, lambda x: recomputed(block, x).sum())(X)
        assert value.item() == gradients["w"].item()
        values.append(value.item())
    assert len(set(values)) == 3


def test_right_the_block_keeps_its_parameters() -> None:
    """And not the placeholders that `mx.checkpoint` puts in their place."""
    block = DroppedSum()
    nn.value_and_grad(block, lambda x: recomputed(block, x).sum())(X)
    assert block.w.item() == 1.0
    mx.eval(block.parameters())
