"""Rung 12, state: a run is saved and resumed late, where the number of updates fits in no byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.lora_ladder.cases import LORA, SPEC, Case, make_factors, make_weights
from tests.lora_ladder.extremes import is_refused, with_ruined_token
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.test_08_step_extremes import LATE
from tests.lora_ladder.test_12_state import windows

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


@pytest.mark.needs("start_at")
def test_a_late_update_of_a_run_equals_the_reference(case: Case, judge: Judge) -> None:
    """The training loop counts on as well: its learning rates are those of the middle of the run."""
    late = replace(LATE["adamw, linear"], iters=2_000_000)

    def act(trainer: Any) -> Arrays:
        trainer.start_at(1_000_000)
        losses = trainer.train([[case.batch]] * 2, late)
        return {"losses": np.array(losses), **trainer.factors()}

    judge(case, act, 2 * case.longest_sum)


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


def test_a_run_that_is_refused_leaves_factors_of_an_earlier_update(
    case: Case, candidate: Any, judge: Judge
) -> None:
    """A rate of 1e30 ruins them: they must be those before the run, whose loss is finite."""
    trainer = case.build(candidate)
    training = TrainConfig(iters=4, learning_rate=1e30)
    if is_refused(lambda: trainer.train(windows(case)[:4], training)):
        judge.same_bits(trainer.factors(), case.factors)


@pytest.mark.needs("save", "load")
def test_a_resumed_run_that_is_refused_leaves_no_earlier_factors_than_it_loaded(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """The batch after the resume holds NaN: what the saved run has learned is not lost."""
    ruined, bad = with_ruined_token(case, np.nan)
    training = TrainConfig(iters=4, learning_rate=0.01)
    first, second = ruined.build(candidate), ruined.with_zero_b().build(candidate)
    first.train([[case.batch]] * STOP, training)
    first.save(tmp_path)
    second.load(tmp_path)
    if is_refused(lambda: second.train([[bad]], training)):
        judge.same_bits(second.factors(), first.factors())


@pytest.mark.needs("save", "load")
def test_a_run_of_a_model_of_twelve_layers_resumes_to_the_bit(
    candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """In the order of names layer 10 comes before layer 2."""
    spec, lora = replace(SPEC, num_hidden_layers=12), replace(LORA, rank=2)
    weights = make_weights(spec)
    case = Case("twelve layers", spec, lora, weights, make_factors(spec, lora, weights))
    training = TrainConfig(iters=4, learning_rate=0.01)
    whole, first, second = (case.build(candidate) for _ in range(3))
    whole.train(windows(case)[:4], training)
    first.train(windows(case)[:STOP], training)
    first.save(tmp_path)
    second.load(tmp_path)
    second.train(windows(case)[STOP:4], training)
    judge.same_bits(second.factors(), whole.factors())
