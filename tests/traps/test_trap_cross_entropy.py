"""`nn.losses.cross_entropy` does not average, and does not ignore the label -100.

PyTorch's `F.cross_entropy` returns the mean and ignores labels of -100. MLX's returns one loss per
position, which is not a scalar to differentiate, and treats -100 as an index from the end of the
vocabulary, so padding trains the token `vocab - 100`. The right form multiplies by a mask and
divides by the number of targets.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

VOCAB = 128
LABELS_B = mx.array([5, -100, 7])


def logits() -> mx.array:
    """logits_BV, shape (3, 128)."""
    return mx.random.normal((3, VOCAB))


def masked_nats(logits_BV: Any, labels_B: mx.array) -> mx.array:
    """The mean over the targets: their sum divided by their number."""
    mask_B = labels_B != -100
    nats_B = nn.losses.cross_entropy(logits_BV, mx.where(mask_B, labels_B, 0))
    return mx.sum(nats_B * mask_B) / mx.sum(mask_B)


def test_wrong_the_default_is_no_mean() -> None:
    """It returns one loss per position, but a gradient needs a scalar."""
    labels_B = mx.array([5, 6, 7])
    assert nn.losses.cross_entropy(logits(), labels_B).shape == (3,)
    with pytest.raises(ValueError) as error:
        mx.value_and_grad(nn.losses.cross_entropy)(logits(), labels_B)
    assert str(error.value) == "[vjp] Output shape (3) does not match cotangent shape ()."


def test_wrong_the_label_minus_100_is_the_token_vocab_minus_100() -> None:
    """-100 and 28 = 128 - 100 have the same loss."""
    logits_BV = logits()
    nats_B = nn.losses.cross_entropy(logits_BV, LABELS_B)
    assert mx.array_equal(nats_B, nn.losses.cross_entropy(logits_BV, mx.array([5, 28, 7])))


def test_wrong_padding_has_a_gradient() -> None:
    """The row labelled -100 is pushed towards token 28."""
    grad_BV = mx.grad(lambda y: nn.losses.cross_entropy(y, LABELS_B, reduction="mean"))(logits())
    assert int(mx.argmin(grad_BV[1])) == VOCAB - 100
    assert grad_BV[1, VOCAB - 100].item() < 0


def test_right_a_mask_leaves_padding_out() -> None:
    """The loss is the mean over the two targets, and the padded row has no gradient."""
    logits_BV = logits()
    rows_BV = np.array(logits_BV, np.float64)[[0, 2]]
    log_z_B = np.log(np.exp(rows_BV).sum(axis=-1))
    expected = np.mean(log_z_B - rows_BV[[0, 1], [5, 7]])
    bound = 8 * np.sqrt(VOCAB) * 2.0**-24 * np.abs(log_z_B).max()
    loss, grad_BV = mx.value_and_grad(masked_nats)(logits_BV, LABELS_B)
    assert abs(loss.item() - expected) <= bound
    assert not mx.any(grad_BV[1]).item()
