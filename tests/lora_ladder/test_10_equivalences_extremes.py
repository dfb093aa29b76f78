"""Rung 10, equivalences: micro-batches without targets, and with NaN, in every way to train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.lora_ladder.cases import Case, rows_of
from tests.lora_ladder.extremes import require_lost, with_ruined_token, without_targets
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.test_10_equivalences import SGD, each_way, trained

both_ways = pytest.mark.parametrize(
    "how", ["train", pytest.param("train_checkpointed", marks=pytest.mark.needs("train_checkpointed"))]
)


@pytest.mark.canonical("accumulation", "pad_targets")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_micro_batch_without_targets_adds_nothing_to_an_update(
    case: Case, judge: Judge, place: int
) -> None:
    """First, in the middle or last of three: neither NaN nor a share of the mean."""
    window = [rows_of(case.batch, [row]) for row in range(3)]
    window[place] = without_targets(window[place])
    accumulating = replace(SGD, iters=1, grad_accumulation_steps=3)
    judge(case, lambda t: trained(t, [window], accumulating))


@both_ways
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_in_a_micro_batch_reaches_the_update(case: Case, judge: Judge, how: str, place: int) -> None:
    """The update is refused, or its loss is NaN: the micro-batch is not skipped."""
    ruined, batch = with_ruined_token(case, np.nan)
    bad, *good = (rows_of(batch, [row]) for row in range(3))
    window = [*good[:place], bad, *good[place:]]
    accumulating = replace(SGD, iters=1, grad_accumulation_steps=3)

    def act(trainer: Any) -> Arrays:
        return {"losses": each_way(how)(trainer, [window], accumulating)["losses"]}

    require_lost(judge, ruined, act, "a NaN in one of three micro-batches")
