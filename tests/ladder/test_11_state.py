"""Rung 11, state: a run that is stopped, saved, loaded and continued is the run that was never stopped.

To the bit: factors, both moments of AdamW, the number of updates behind its bias corrections and the
schedule, and the random state of dropout. MLX: `optimizer.state` holds the step and the moments; an optimizer
made anew begins at step 0 with moments of zero, and nothing says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.ladder.cases import Case, rows_of
from tests.ladder.judge import Judge
from tests.ladder.protocol import Arrays

ITERS, STOP = 6, 2
RUNS = {
    "adamw": TrainConfig(iters=ITERS, learning_rate=0.01, weight_decay=0.1),
    "sgd": TrainConfig(iters=ITERS, learning_rate=0.05, optimizer="sgd"),
    "cosine": TrainConfig(iters=ITERS, learning_rate=0.01, lr_schedule="cosine", warmup_steps=3),
}
needs_state = pytest.mark.needs("save", "load")
each_run = pytest.mark.parametrize("training", RUNS.values(), ids=RUNS)


def windows(case: Case) -> list[list[Any]]:
    """Of each update another batch."""
    return [[rows_of(case.batch, [t % 3, (t + 1) % 3])] for t in range(ITERS)]


def uninterrupted(case: Case, candidate: Any, training: TrainConfig) -> Arrays:
    trainer = case.build(candidate)
    losses = trainer.train(windows(case), training)
    return {"losses": np.array(losses), **trainer.factors()}


def interrupted(case: Case, candidate: Any, training: TrainConfig, folder: Path) -> Arrays:
    """The second trainer is given other factors than the first had: it must take those that were saved."""
    first, second = case.build(candidate), case.with_zero_b().build(candidate)
    before = first.train(windows(case)[:STOP], training)
    first.save(folder)
    second.load(folder)
    after = second.train(windows(case)[STOP:], training)
    return {"losses": np.array([*before, *after]), **second.factors()}


@needs_state
@each_run
def test_a_run_goes_on_after_a_stop_as_if_there_had_been_none(
    case: Case, candidate: Any, judge: Judge, training: TrainConfig, tmp_path: Path
) -> None:
    """Two updates, a stop, four more: losses and factors of six without a stop."""
    judge.same_bits(
        uninterrupted(case, candidate, training), interrupted(case, candidate, training, tmp_path)
    )


@needs_state
@pytest.mark.parametrize("case", ["dora"], indirect=True)
def test_magnitudes_go_on_too(case: Case, candidate: Any, judge: Judge, tmp_path: Path) -> None:
    """What DoRA trains beside A and B is state as well."""
    training = RUNS["adamw"]
    judge.same_bits(
        uninterrupted(case, candidate, training), interrupted(case, candidate, training, tmp_path)
    )


@needs_state
def test_dropout_goes_on_where_it_stopped(case: Case, candidate: Any, judge: Judge, tmp_path: Path) -> None:
    """The masks after a stop are those that would have come."""
    dropping, training = case.with_dropout(0.25), RUNS["adamw"]
    judge.same_bits(
        uninterrupted(dropping, candidate, training), interrupted(dropping, candidate, training, tmp_path)
    )


@needs_state
def test_saving_and_loading_leave_the_base_alone(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """Neither the trainer that is saved moves, nor the base of the one that goes on."""
    first, second = case.build(candidate), case.build(candidate)
    first.train(windows(case)[:STOP], RUNS["adamw"])
    before = first.factors()
    first.save(tmp_path)
    judge.same_bits({**first.factors(), **first.base()}, {**before, **case.weights})
    second.load(tmp_path)
    second.train(windows(case)[STOP:], RUNS["adamw"])
    judge.same_bits(second.base(), case.weights)
