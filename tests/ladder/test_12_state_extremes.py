"""Rung 12, state: a run is saved and resumed late, where the number of updates fits in no byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.ladder.cases import Case
from tests.ladder.judge import Judge
from tests.ladder.protocol import Arrays
from tests.ladder.test_12_state import windows

STOP, ITERS = 2, 4


def late_run(case: Case, candidate: Any, done: int, folder: Path | None, kind: str = "adamw") -> Arrays:
    """Four updates from `done` on, in one go or saved and resumed after two."""
    training = TrainConfig(iters=2 * done, learning_rate=0.01, lr_schedule="cosine", optimizer=kind)
    trainer, given = case.with_dropout(0.25).build(candidate), windows(case)[:ITERS]
    trainer.start_at(done)
    if folder is None:
        return {"losses": np.array(trainer.train(given, training)), **trainer.factors()}
    before = trainer.train(given[:STOP], training)
    trainer.save(folder)
    second = case.with_zero_b().with_dropout(0.25).build(candidate)
    second.load(folder)
    after = second.train(given[STOP:], training)
    return {"losses": np.array([*before, *after]), **second.factors()}


@pytest.mark.needs("save", "load", "start_at")
@pytest.mark.parametrize("done", [255, 65_535, 1_000_000])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_run_resumed_late_equals_the_uninterrupted_run_to_the_bit(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path, done: int, kind: str
) -> None:
    """Saved at update 257, 65,537 or 1,000,002: schedule, bias correction and dropout count on."""
    judge.same_bits(
        late_run(case, candidate, done, tmp_path, kind), late_run(case, candidate, done, None, kind)
    )
