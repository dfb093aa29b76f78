"""Rung 12, state: bit-exact resume. A run that is saved, loaded and continued equals the uninterrupted run.

So does one from examples (`fit`): validating, saving and stopping between updates change nothing.

That needs the factors, both moments of AdamW, the number of updates (for bias correction and schedule), and
the random state of dropout. MLX: `optimizer.state` holds the step counter and the moments. A new optimizer
silently starts from step 0 with zero moments.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.lora_ladder.cases import Case, rows_of
from tests.lora_ladder.examples import BATCHINGS, alone, fitted, fitting, held_out, to_fit, trained_on
from tests.lora_ladder.extremes import is_refused
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays, Examples

ITERS, STOP = 6, 2
MIDDLE = 3  # updates of `fit` before a validation that is compared
RUNS = {
    "adamw": TrainConfig(iters=ITERS, learning_rate=0.01, weight_decay=0.1),
    "sgd": TrainConfig(iters=ITERS, learning_rate=0.05, optimizer="sgd"),
    "cosine": TrainConfig(iters=ITERS, learning_rate=0.01, lr_schedule="cosine", warmup_steps=3),
}
needs_state = pytest.mark.needs("save", "load")
each_run = pytest.mark.parametrize("training", RUNS.values(), ids=RUNS)


def windows(case: Case) -> list[list[Any]]:
    """A different batch for each update."""
    return [[rows_of(case.batch, [t % 3, (t + 1) % 3])] for t in range(ITERS)]


def uninterrupted(case: Case, candidate: Any, training: TrainConfig) -> Arrays:
    trainer = case.build(candidate)
    losses = trainer.train(windows(case), training)
    return {"losses": np.array(losses), **trainer.factors()}


def interrupted(case: Case, candidate: Any, training: TrainConfig, folder: Path) -> Arrays:
    """The second trainer starts with other factors than the first, so it must load the saved ones."""
    first, second = case.build(candidate), case.with_zero_b().build(candidate)
    before = first.train(windows(case)[:STOP], training)
    first.save(folder)
    second.load(folder)
    after = second.train(windows(case)[STOP:], training)
    return {"losses": np.array([*before, *after]), **second.factors()}


@needs_state
@each_run
def test_a_resumed_run_equals_the_uninterrupted_run_to_the_bit(
    case: Case, candidate: Any, judge: Judge, training: TrainConfig, tmp_path: Path
) -> None:
    """Two updates, a stop and four more give the losses and factors of six updates without a stop."""
    judge.same_bits(
        uninterrupted(case, candidate, training), interrupted(case, candidate, training, tmp_path)
    )


@needs_state
@pytest.mark.parametrize("case", ["dora"], indirect=True)
def test_a_resumed_dora_run_equals_the_uninterrupted_run_to_the_bit(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """DoRA's magnitudes are training state too."""
    training = RUNS["adamw"]
    judge.same_bits(
        uninterrupted(case, candidate, training), interrupted(case, candidate, training, tmp_path)
    )


@needs_state
def test_a_resumed_run_draws_the_same_dropout_masks(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """The masks after the stop are those of the uninterrupted run."""
    dropping, training = case.with_dropout(0.25), RUNS["adamw"]
    judge.same_bits(
        uninterrupted(dropping, candidate, training), interrupted(dropping, candidate, training, tmp_path)
    )


@needs_state
def test_saving_and_loading_leave_the_base_alone(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """Saving changes no factor and no base weight; loading and continuing change no base weight."""
    first, second = case.build(candidate), case.build(candidate)
    first.train(windows(case)[:STOP], RUNS["adamw"])
    before = first.factors()
    first.save(tmp_path)
    judge.same_bits({**first.factors(), **first.base()}, {**before, **case.weights})
    second.load(tmp_path)
    second.train(windows(case)[STOP:], RUNS["adamw"])
    judge.same_bits(second.base(), case.weights)


@pytest.mark.needs("micro_batches", "fit")
@pytest.mark.canonical("pad_targets")
@pytest.mark.parametrize("batching", BATCHINGS)
def test_fitting_examples_equals_the_reference_on_the_same_examples(
    case: Case, candidate: Any, judge: Judge, batching: str, tmp_path: Path
) -> None:
    """As users train: from examples, validated between updates. The reference gets one example a row.

    It takes them in the order that rung 3 judged. Compared are all losses, the validation losses at the
    beginning, in the middle and in the end, and the factors.
    """
    examples, training = to_fit(), fitting(batching)
    order = trained_on(candidate, examples, training, case)
    windows = [[alone([examples[n] for row in batch for n in row]) for batch in window] for window in order]
    judge.subject = f"examples {order}"

    def expected(trainer: Any) -> Arrays:
        losses, validations = [], [trainer.evaluate([alone(held_out())])]
        for part in (windows[:MIDDLE], windows[MIDDLE:]):
            losses += trainer.train(part, training)
            validations.append(trainer.evaluate([alone(held_out())]))
            trainer.save(tmp_path)
            trainer.load(tmp_path)
        return {
            "losses": np.array(losses),
            "validation losses": np.array(validations),
            **trainer.factors(),
        }

    ours = fitted(case.build(candidate), examples, training, held_out())
    ours["validation losses"] = ours["validation losses"][[0, MIDDLE, -1]]
    judge.given(ours, case, expected, training.iters * case.longest_sum)


@pytest.mark.needs("fit")
@pytest.mark.parametrize("batching", BATCHINGS)
def test_validating_between_updates_changes_nothing(
    case: Case, candidate: Any, judge: Judge, batching: str
) -> None:
    """Not the dropout masks, not the mode, not the order: the same losses and factors to the bit."""
    dropping, training = case.with_dropout(0.25), fitting(batching)
    without, validated = (
        fitted(dropping.build(candidate), to_fit(), training, validation) for validation in ((), held_out())
    )
    judge.same_bits({name: validated[name] for name in without}, without)


@pytest.mark.needs("fit")
@pytest.mark.parametrize("batching", BATCHINGS)
def test_validating_on_the_examples_of_the_run_changes_nothing(
    case: Case, candidate: Any, judge: Judge, batching: str
) -> None:
    """A program gives `fit` and the validation one and the same list, which nobody may sort or shuffle."""
    examples, training = to_fit(), fitting(batching)
    without = fitted(case.build(candidate), examples, training)
    validated = fitted(case.build(candidate), examples, training, examples)
    judge.same_bits({name: validated[name] for name in without}, without)


@pytest.mark.needs("fit")
def test_a_validation_drops_nothing(case: Case, candidate: Any, judge: Judge) -> None:
    """Before the first update it is the reference's loss without dropout; after a few that of the factors."""
    dropping, training = case.with_dropout(0.25), fitting("plain")
    ours = fitted(dropping.build(candidate), to_fit(), training, held_out())
    losses, factors = ours.pop("validation losses"), {n: ours[n] for n in case.factors}
    judge.given(
        {"nats": losses[0]}, case, lambda trainer: {"nats": np.array(trainer.evaluate([alone(held_out())]))}
    )
    again = replace(dropping, factors=factors).build(candidate).fit(to_fit(), training, 0, held_out())[1]
    judge.hold([judge.rounded("nats after the run", losses[-1], np.array(again[0]), case.longest_sum)])


@pytest.mark.needs("fit")
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_validation_weighs_every_target_alike_at_any_batch_size(
    case: Case, judge: Judge, candidate: Any, size: int
) -> None:
    """Examples with unequal numbers of targets, in batches of which the last may be smaller."""
    training = replace(fitting("plain"), batch_size=size)
    ours = case.build(candidate).fit(to_fit(), training, 0, held_out())[1]
    judge.given(
        {"nats": np.array(ours[0])},
        case,
        lambda trainer: {"nats": np.array(trainer.evaluate([alone(held_out())]))},
    )


@pytest.mark.needs("fit", "save", "load")
@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_run_stopped_after_every_update_equals_the_uninterrupted_run_to_the_bit(
    case: Case, candidate: Any, judge: Judge, batching: str, tmp_path: Path
) -> None:
    """In the middle of an epoch and at its end, each time in a new trainer, with dropout and validation."""
    dropping, training = case.with_dropout(0.25), fitting(batching)
    expected = fitted(dropping.build(candidate), to_fit(), training, held_out())
    losses: list[float] = []
    validations: list[float] = []
    for update in range(training.iters):
        trainer = (dropping.with_zero_b() if update else dropping).build(candidate)
        if update:
            trainer.load(tmp_path)
        loss, both = trainer.fit(to_fit(), training, 1, held_out())
        trainer.save(tmp_path)
        losses, validations = losses + loss, validations + both[bool(update) :]
    ours = {"losses": np.array(losses), "validation losses": np.array(validations), **trainer.factors()}
    judge.same_bits(ours, expected)


@pytest.mark.needs("fit", "save", "load", "validation_losses")
def test_a_resumed_run_remembers_its_validation_losses(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """By update: what is the best so far, and when to stop, depends on all of them."""
    training = fitting("plain")
    whole, first, second = (case.build(candidate) for _ in range(3))
    whole.fit(to_fit(), training, training.iters, held_out())
    first.fit(to_fit(), training, MIDDLE, held_out())
    first.save(tmp_path)
    second.load(tmp_path)
    second.fit(to_fit(), training, training.iters - MIDDLE, held_out())
    ours, expected = (
        {f"after update {update}": np.array(nats) for update, nats in trainer.validation_losses().items()}
        for trainer in (second, whole)
    )
    judge.same_bits(ours, expected)


def with_another(what: str, examples: Examples) -> Examples:
    """The same examples but for one token, or one flag, of the last."""
    *others, (tokens, is_target) = examples
    if what == "token":
        return [*others, ((*tokens[:-1], tokens[-1] + 1), is_target)]
    return [*others, (tokens, (*is_target[:1], not is_target[1], *is_target[2:]))]


@pytest.mark.needs("fit", "save", "require_same_run")
def test_a_run_is_resumed_with_its_own_examples_and_settings_only(
    case: Case, candidate: Any, judge: Judge, tmp_path: Path
) -> None:
    """One token, one flag, a seed or a rate that is another one is refused; the same are not."""
    examples, training = to_fit(), fitting("plain")
    trainer = case.build(candidate)
    trainer.fit(examples, training, 1, ())
    trainer.save(tmp_path)
    trainer.require_same_run(tmp_path, examples, training)
    others = {
        "token": (with_another("token", examples), training),
        "target": (with_another("flag", examples), training),
        "order of the examples": (examples[::-1], training),
        "seed": (examples, replace(training, seed=1)),
        "seed of the order": (examples, replace(training, data_seed=1)),
        "learning rate": (examples, replace(training, learning_rate=0.02)),
    }
    for name, given in others.items():
        again = partial(case.build(candidate).require_same_run, tmp_path, *given)
        judge.claim(is_refused(again), f"a run with another {name} must be refused, and goes on")


@pytest.mark.needs("fit", "save", "load")
@pytest.mark.parametrize("batching", BATCHINGS)
def test_saving_between_updates_changes_nothing(
    case: Case, candidate: Any, judge: Judge, batching: str, tmp_path: Path
) -> None:
    """The run goes on as if it had not been saved: the same masks, the same examples, the same bits."""
    dropping, training = case.with_dropout(0.25), fitting(batching)
    expected = fitted(dropping.build(candidate), to_fit(), training)
    judge.same_bits(fitted(dropping.build(candidate), to_fit(), training, (), tmp_path), expected)
