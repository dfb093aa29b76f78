"""`labels = input_ids` without a shift teaches the model to copy its input.

Hugging Face's PyTorch models shift the labels themselves, so `labels=input_ids` is right there. A
hand-written loss must compare position t with token t + 1. Without the shift the loss falls to 0,
and the real next-token loss rises.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

VOCAB = 11
UNIFORM_NATS = float(np.log(VOCAB))
IDS_BT = mx.array([[(start + 3 * t) % VOCAB for t in range(9)] for start in (4, 7, 1, 0)])


class TokenModel(nn.Module):
    """logits_BTV = head(embed(ids_BT)): enough to learn "the next token is this one plus 3"."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def __call__(self, ids_BT: mx.array) -> mx.array:
        return self.head(self.embed(ids_BT))


def unshifted_nats(model: Any, ids_BT: mx.array) -> mx.array:
    """The plan's loss: labels are the input itself."""
    return nn.losses.cross_entropy(model(ids_BT), ids_BT, reduction="mean")


def next_token_nats(model: Any, ids_BT: mx.array) -> mx.array:
    """Position t predicts token t + 1."""
    return nn.losses.cross_entropy(model(ids_BT[:, :-1]), ids_BT[:, 1:], reduction="mean")


def train(loss_fn: Callable[[Any, mx.array], mx.array]) -> TokenModel:
    """Sixty steps on the four sequences."""
    model = TokenModel()
    optimizer = optim.Adam(learning_rate=0.05, bias_correction=True)
    step = nn.value_and_grad(model, loss_fn)
    for _ in range(60):
        loss, grads = step(model, IDS_BT)
        optimizer.update(model, grads)
        mx.eval(loss, model.parameters(), optimizer.state)
    return model


def test_wrong_the_loss_falls_to_zero_and_the_next_token_is_worse_than_a_guess() -> None:
    """Copy loss below 0.01 nats, next-token loss above that of a uniform guess."""
    model = train(unshifted_nats)
    assert unshifted_nats(model, IDS_BT).item() < 0.01
    assert next_token_nats(model, IDS_BT).item() > UNIFORM_NATS


def test_wrong_the_model_answers_with_its_input() -> None:
    """The most likely "next" token is the token just read."""
    model = train(unshifted_nats)
    assert mx.array_equal(mx.argmax(model(IDS_BT), axis=-1), IDS_BT)


def test_right_the_shifted_loss_learns_the_next_token() -> None:
    """Next-token loss below 0.01 nats, and the model's answers are the next tokens."""
    model = train(next_token_nats)
    assert next_token_nats(model, IDS_BT).item() < 0.01
    assert mx.array_equal(mx.argmax(model(IDS_BT[:, :-1]), axis=-1), IDS_BT[:, 1:])


def test_right_the_copy_loss_is_the_one_that_rises() -> None:
    """A model that predicts the next token is bad at copying: the two losses disagree."""
    assert unshifted_nats(train(next_token_nats), IDS_BT).item() > UNIFORM_NATS
