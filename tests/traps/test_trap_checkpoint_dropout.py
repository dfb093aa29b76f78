"""Gradient checkpointing computes twice, and what it draws at random is another number the second time.

PyTorch's `checkpoint` saves and restores the random state (`preserve_rng_state`). `mx.checkpoint` calls its
function again with MLX's global state as it is by then, so a dropout mask differs between the loss and its
gradient: nothing fails, and the gradient is that of another function. A key that is an argument of the
function is the same both times; this is what `mlx_impl/recompute.py` does.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.lora import Dropout
from mlx_impl.recompute import recomputed

X = mx.arange(1.0, 65.0)


def dropped_sum(w: mx.array, key: mx.array | None = None) -> mx.array:
    """w times the sum of what dropout leaves: linear in w, so at w = 1 value and gradient are one number."""
    return w * (X * mx.random.bernoulli(0.5, X.shape, key)).sum()


class DroppedSum(nn.Module):
    """The same as a block."""

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
    """And a new mask each time."""
    block, values = DroppedSum(), []
    mx.random.seed(0)
    for _ in range(3):
        value, gradients = nn.value_and_grad(block, lambda x: recomputed(block, x).sum())(X)
        assert value.item() == gradients["w"].item()
        values.append(value.item())
    assert len(set(values)) == 3


def test_right_the_block_keeps_its_parameters() -> None:
    """Not those that the transformation put in their place."""
    block = DroppedSum()
    nn.value_and_grad(block, lambda x: recomputed(block, x).sum())(X)
    assert block.w.item() == 1.0
    mx.eval(block.parameters())
