"""Rung 12, state: a run that is watched update by update has done what it has told, and no more.

A program that validates, answers or stops between two updates sees the run through an iterator. A trainer
that reads ahead, or tells late, is right as long as nobody stops; then the windows that it has read are lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.data import Batch
from tests.lora_ladder.cases import Case
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.test_12_state import ITERS, RUNS, STOP, uninterrupted, windows

Windows = list[list[Batch]]


class Counted:
    """An iterator of windows that counts how many were taken."""

    def __init__(self, given: Windows) -> None:
        self.windows, self.taken = iter(given), 0

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        window = next(self.windows)
        self.taken += 1
        return window


@pytest.mark.needs("each_update")
def test_an_update_takes_its_own_window_and_leaves_the_rest(case: Case, candidate: Any, judge: Judge) -> None:
    """After k losses k windows are taken; none is taken before the first loss is asked for."""
    given = Counted(windows(case))
    losses = case.build(candidate).each_update(given, RUNS["adamw"])
    taken = [given.taken, *(given.taken for _ in losses)]
    expected = list(range(ITERS + 1))
    judge.claim(taken == expected, f"after 0, 1, 2, ... losses {expected} windows must be taken, got {taken}")


@pytest.mark.needs("each_update")
@pytest.mark.parametrize("done", range(1, ITERS + 1))
def test_a_run_that_has_told_so_many_losses_has_made_so_many_updates(
    case: Case, candidate: Any, judge: Judge, done: int
) -> None:
    """Losses and factors are those of a run on so many windows, to the bit; the iterator is not closed."""
    watched, whole = case.build(candidate), case.build(candidate)
    losses = watched.each_update(iter(windows(case)), RUNS["cosine"])
    ours = {"losses": np.array(list(islice(losses, done))), **watched.factors()}
    expected = {"losses": np.array(whole.train(windows(case)[:done], RUNS["cosine"])), **whole.factors()}
    judge.same_bits(ours, expected)


@pytest.mark.needs("each_update", "save", "load")
@pytest.mark.parametrize("is_forgotten", [True, False], ids=["forgotten", "kept"])
def test_a_run_goes_on_with_the_rest_of_its_windows(
    case: Case, candidate: Any, judge: Judge, is_forgotten: bool, tmp_path: Path
) -> None:
    """Stopped after two updates and resumed on the rest: the uninterrupted run, with dropout, to the bit."""
    dropping, training = case.with_dropout(0.25), RUNS["adamw"]
    first, second = dropping.build(candidate), dropping.with_zero_b().build(candidate)
    given = iter(windows(case))
    losses = first.each_update(given, training)
    before = list(islice(losses, STOP))
    if is_forgotten:
        del losses
    first.save(tmp_path)
    second.load(tmp_path)
    after = list(second.each_update(given, training))
    ours = {"losses": np.array([*before, *after]), **second.factors()}
    judge.same_bits(ours, uninterrupted(dropping, candidate, training))
