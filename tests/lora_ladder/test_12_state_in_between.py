"""Rung 12, state: what happens between two updates (a refusal, a validation, other factors) counts at once.

A run holds its factors in several places: the model, the optimizer, the states that it may go back to, and
whatever it has compiled or remembered. MLX: an assignment to `x[:]` changes `x` for everyone who holds it,
and a compiled function keeps as constants the arrays that it was not told of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.cases import Case
from tests.lora_ladder.examples import HELD_OUT, SMALL_FIRST_TOKENS, fitting, held_out, make_examples, to_fit
from tests.lora_ladder.extremes import is_refused, with_ruined_token
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays, Examples
from tests.lora_ladder.test_12_state import windows

ADAMW = TrainConfig(iters=6, learning_rate=0.01, weight_decay=0.1)
SGD = TrainConfig(iters=6, learning_rate=0.05, optimizer="sgd")
DONE, END = 3, 5  # updates before something happens, and in the end
puts_factors = pytest.mark.needs("set_factors")
each_optimizer = pytest.mark.parametrize("training", [ADAMW, SGD], ids=["adamw", "sgd"])


@puts_factors
@each_optimizer
def test_factors_put_in_between_two_parts_of_a_run_are_trained_on(
    case: Case, judge: Judge, training: TrainConfig
) -> None:
    """Three updates, back to the factors of the beginning, and on: the moments and the schedule continue."""

    def act(trainer: Any) -> Arrays:
        first = trainer.factors()
        before = trainer.train(windows(case)[:DONE], training)
        trainer.set_factors(first)
        after = trainer.train(windows(case)[DONE:END], training)
        return {"losses": np.array([*before, *after]), **trainer.factors()}

    judge(case, act, END * case.longest_sum)


def after_updates(case: Case, candidate: Any, number: int) -> Arrays:
    trainer = case.build(candidate)
    trainer.train(windows(case)[:number], ADAMW)
    return trainer.factors()


def are_the_same(ours: Arrays, others: Arrays) -> bool:
    return all(np.array_equal(ours[name], others[name]) for name in others)


def refused(trainer: Any, before: list[list[Batch]], bad: Batch, training: TrainConfig = ADAMW) -> bool:
    return is_refused(lambda: trainer.train([*before, [bad]], training))


@each_optimizer
def test_a_run_refused_after_some_updates_leaves_the_factors_of_one_of_them(
    case: Case, candidate: Any, judge: Judge, training: TrainConfig
) -> None:
    """The fourth batch holds NaN: what came before is there to the bit, not what there was at first."""
    ruined, bad = with_ruined_token(case, np.nan)
    trainer = ruined.build(candidate)
    if not refused(trainer, windows(case)[:DONE], bad, training):
        return
    runs = [ruined.build(candidate) for _ in range(DONE)]
    for number, run in enumerate(runs, 1):
        run.train(windows(case)[:number], training)
    ours, reached = trainer.factors(), [run.factors() for run in runs]
    if not any(are_the_same(ours, factors) for factors in reached):
        judge.same_bits(ours, reached[-1])


@pytest.mark.needs("save", "load")
def test_a_run_refused_after_some_updates_goes_on_as_if_it_had_not_met_the_nan(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """From the update that it is back at, with other batches: moments and schedule are of that update too."""
    ruined, bad = with_ruined_token(case, np.nan)
    trainer, second, whole = (ruined.build(candidate) for _ in range(3))
    if not refused(trainer, windows(case)[:DONE], bad):
        return
    ours = trainer.factors()
    reached = [n for n in range(DONE + 1) if are_the_same(ours, after_updates(ruined, candidate, n))]
    judge.claim(bool(reached), f"a refused run must be back at one of its {DONE} updates, and is at none")
    trainer.save(tmp_path)
    second.load(tmp_path)
    losses = second.train(windows(case)[reached[-1] : END], ADAMW)
    expected = whole.train(windows(case)[:END], ADAMW)[reached[-1] :]
    judge.same_bits(
        {"losses": np.array(losses), **second.factors()}, {"losses": np.array(expected), **whole.factors()}
    )


@puts_factors
def test_factors_put_in_are_those_that_a_refused_update_leaves(
    case: Case, candidate: Any, judge: Judge
) -> None:
    """Whoever puts in others has discarded those that the run had."""
    ruined, bad = with_ruined_token(case, np.nan)
    trainer = ruined.build(candidate)
    trainer.train(windows(case)[:DONE], ADAMW)
    put = after_updates(case, candidate, 1)
    trainer.set_factors(put)
    if refused(trainer, [], bad):
        judge.same_bits(trainer.factors(), put)


def others_of_the_same_lengths() -> Examples:
    return make_examples(HELD_OUT, SMALL_FIRST_TOKENS, seed=73)


@puts_factors
@pytest.mark.needs("fit")
def test_a_validation_is_of_its_examples_and_of_the_factors_that_are_there(case: Case, judge: Judge) -> None:
    """After one update: of two sets, of the first again with other factors; and an update later."""
    training = fitting("plain")

    def act(trainer: Any) -> Arrays:
        first = trainer.factors()
        losses, validations = trainer.fit(to_fit(), training, 1, held_out())
        for factors, number, examples in (
            (trainer.factors(), 0, others_of_the_same_lengths()),
            (first, 0, held_out()),
            (first, 1, held_out()),
        ):
            trainer.set_factors(factors)
            of_part, nats = trainer.fit(to_fit(), training, number, examples)
            losses, validations = [*losses, *of_part], [*validations, *nats]
        return {"losses": np.array(losses), "validation losses": np.array(validations), **trainer.factors()}

    judge(case, act, training.iters * case.longest_sum)


@puts_factors
@pytest.mark.needs("train_compiled", "fit")
def test_a_validation_in_a_compiled_run_is_of_the_factors_that_are_there(
    case: Case, candidate: Any, judge: Judge
) -> None:
    """After an update, and again with the factors of the beginning."""
    training = replace(SGD, batch_size=2)

    def act(trainer: Any, train: Callable[..., list[float]]) -> Arrays:
        first = trainer.factors()
        train([[case.batch]], training)
        validations: list[float] = []
        for factors in (trainer.factors(), first):
            trainer.set_factors(factors)
            validations += trainer.fit(to_fit(), training, 0, held_out())[1]
        return {"validation losses": np.array(validations)}

    trainer = case.build(candidate)
    ours = act(trainer, trainer.train_compiled)
    judge.given(ours, case, lambda trainer: act(trainer, trainer.train), 2 * case.longest_sum)
