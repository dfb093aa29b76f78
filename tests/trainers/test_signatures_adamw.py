"""The culprit of a trainer that has AdamW alone: what is tried by AdamW instead, what is not."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from torch.nn.utils import clip_grad_norm_

from tests.lora_ladder.culprit import (
    Culprit,
    answer_of,
    dropout,
    explains,
    named_in,
    quietly,
    sentences,
    without_stand_ins,
)
from tests.lora_ladder.observations import FAMILIES, Observation, of_updates
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.signatures import sound
from tests.trainers.reference import Float32Reference

UPDATES = next(family for family in FAMILIES if family.what == "updates")


class AdamWOnly(Float32Reference):
    def train(self, windows: Any, training: Any) -> list[float]:
        if training.optimizer != "adamw":
            raise NotImplementedError("AdamW alone")
        return super().train(windows, training)


class ClipsTheSum(AdamWOnly):
    """The gradient of the sum of nats is clipped, and then divided by the number of targets."""

    def train(self, windows: Any, training: Any) -> list[float]:
        counts = iter([sum(int(batch.mask_BT.sum()) for batch in window) for window in windows])

        def clip(parameters: Any, limit: float) -> Any:
            return clip_grad_norm_(parameters, limit / next(counts))

        with patch("reference.train.clip_grad_norm_", clip):
            return super().train(windows, training)


class OneMask(AdamWOnly):
    """Dropout's generator is set to the same seed before each update."""

    def train(self, windows: Any, training: Any) -> list[float]:
        return [super(OneMask, self).train([window], training)[0] for window in windows]


def answers(trainer: Any) -> list[tuple[Observation, Arrays | None]]:
    return without_stand_ins([(o, answer_of(trainer, o)) for o in of_updates()])


def test_what_sgd_is_not_claimed_for_is_tried_by_adamw() -> None:
    tried = [o.name for o, ours in answers(AdamWOnly) if ours is not None]
    assert "adamw, clipping" in tried and "adamw, accumulation and clipping" in tried
    assert "sgd, accumulation" not in [o.name for o, _ in answers(AdamWOnly)]
    assert not any(o.instead_of for o, _ in answers(Float32Reference))


def test_a_sum_that_is_clipped_before_it_is_divided_is_named_by_adamw() -> None:
    with quietly():
        judged = [(o, ours) for o, ours in answers(ClipsTheSum) if ours is not None]
        agree = [explains(sound, "", ClipsTheSum, o, ours) for o, ours in judged]
        culprit = named_in(UPDATES, judged, agree, ClipsTheSum)
    assert [signature.name for signature in culprit.named] == ["sum clipped, not the mean"], culprit.fails


def test_a_mask_that_stays_the_same_is_named_by_the_losses_at_rate_0() -> None:
    assert [one.name for one in dropout(OneMask) or []] == ["dropout update"]
    assert dropout(AdamWOnly) == []


def test_where_nothing_departs_it_says_what_was_tried_and_what_was_not() -> None:
    culprit = Culprit(agreed=["logits", "updates (adamw, first update)"], not_tried=["dropout's own masks"])
    assert list(sentences(culprit)) == [
        "culprit: not known; on small cases these agree: logits; updates (adamw, first update)",
        "  not tried: dropout's own masks",
    ]
