"""Rung 5, loss: many targets and none, logits of 1e4, and NaN.

The loss is a sum and a count, so a batch without targets has the loss 0 and the count 0. A trainer may go
over the targets or the vocabulary in chunks: the batch of the size claims has more than 2**25 logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_impl.data import Batch
from tests.derived import within
from tests.lora_ladder.cases import Case, make_batch, random_rows, rows_of
from tests.lora_ladder.extremes import (
    COPIES,
    ENDS,
    long_rows,
    many_rows,
    many_words,
    repeated,
    require_lost,
    require_none_finite,
    sharp,
    unless_refused,
    windowed_rows,
    with_number,
    with_ruined_token,
    without_targets,
)
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.test_05_loss import sum_and_count

DOWN_B = "model.layers.0.mlp.down_proj.lora_b"


SIZES = {"long rows": long_rows, "in a window": windowed_rows, "large scores and logits": sharp}


@pytest.mark.parametrize("make", SIZES.values(), ids=SIZES)
def test_the_loss_at_extremes_equals_the_reference(make: Any, judge: Judge) -> None:
    """Over a thousand targets in a row; and a loss of thousands of nats a target."""
    case = make()
    judge(case, lambda trainer: sum_and_count(trainer, case.batch))


def test_more_logits_than_are_computed_at_once_are_a_sum_over_all(candidate: Any, judge: Judge) -> None:
    """18 copies of a batch have 18 times its nats and targets, in any number of chunks."""
    case = many_words()
    expected, noise = judge.reference(case, lambda trainer: sum_and_count(trainer, case.batch))
    ours = sum_and_count(case.build(candidate), repeated(case.batch, COPIES))
    judge.same_bits(
        {"number of targets": ours["num_targets"]}, {"number of targets": COPIES * expected["num_targets"]}
    )
    judge.hold(
        [within("nats", ours["nats"], COPIES * expected["nats"], COPIES * noise["nats"], case.longest_sum)]
    )


@pytest.mark.canonical("pad_targets")
def test_more_positions_than_16_bits_count_have_the_same_loss(candidate: Any, judge: Judge) -> None:
    """300 rows padded to 220 positions: indices of positions go beyond 65,535, the loss stays."""
    case = many_rows()
    rows = random_rows(case.spec.vocab_size, case.token_counts)
    wide = make_batch(rows, case.prompt_counts, width=220)
    ours = sum_and_count(case.build(candidate), wide)
    judge.given(ours, case, lambda trainer: sum_and_count(trainer, case.batch))


@pytest.mark.canonical("pad_targets")
def test_a_batch_without_targets_has_no_nats_and_no_targets(case: Case, candidate: Any, judge: Judge) -> None:
    """The sum is 0 and the count is 0: neither is NaN, and the count is not 1."""
    nats, num_targets = case.build(candidate).loss(without_targets(case.batch))
    judge.same_bits({"nats": nats, "targets": num_targets}, {"nats": 0.0, "targets": 0})


@pytest.mark.canonical("pad_targets")
@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_a_single_target_at_the_edge_of_a_row_is_counted(case: Case, judge: Judge, position: int) -> None:
    """The first position has no past; the last one is the end of the longest row."""
    mask_BT = np.zeros_like(case.batch.mask_BT)
    mask_BT[0, position] = True
    judge(case, lambda trainer: sum_and_count(trainer, case.batch._replace(mask_BT=mask_BT)))


@pytest.mark.needs("evaluate")
@pytest.mark.canonical("pad_targets")
def test_a_batch_without_targets_does_not_change_an_evaluation(case: Case, judge: Judge) -> None:
    """Nothing over nothing is left out of the mean."""
    batches = [case.batch, without_targets(case.batch)]
    judge(case, lambda trainer: {"mean nats": np.array(trainer.evaluate(batches))})


@pytest.mark.needs("evaluate")
@pytest.mark.canonical("pad_targets")
def test_an_evaluation_without_targets_is_no_number(case: Case, judge: Judge) -> None:
    """0 / 0 is refused, or NaN; it is not the perfect loss 0."""
    batches = [without_targets(case.batch)]
    require_lost(judge, case, lambda t: {"mean nats": np.array(t.evaluate(batches))}, "0 nats over 0 targets")


@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
def test_a_number_that_ends_reaches_the_loss(case: Case, judge: Judge, number: float) -> None:
    """From a factor; the number of targets stays."""
    ruined = with_number(case, DOWN_B, number)
    require_lost(judge, ruined, lambda t: {"nats": np.array(t.loss(case.batch)[0])}, f"{number} in a factor")


def test_a_nan_in_one_row_of_a_batch_reaches_the_loss(case: Case, judge: Judge) -> None:
    """A sum over rows with one NaN is NaN: the row is not left out."""
    ruined, batch = with_ruined_token(case, np.nan)
    require_lost(judge, ruined, lambda t: {"nats": np.array(t.loss(batch)[0])}, "a NaN in the first token")


@pytest.mark.needs("evaluate")
def test_a_nan_in_one_batch_reaches_the_evaluation(case: Case, judge: Judge) -> None:
    """The mean over batches is not that of the finite ones."""
    ruined, batch = with_ruined_token(case, np.nan)
    batches = [rows_of(batch, [1, 2]), rows_of(batch, [0])]
    require_lost(judge, ruined, lambda t: {"mean nats": np.array(t.evaluate(batches))}, "a NaN in one batch")


def given_logits(number: float, position: int, word: int) -> tuple[np.ndarray, Batch]:
    """Logits of three positions, the second not a target; one of them is this number. Targets are 2, 5, 7."""
    logits_BTV = np.random.default_rng(31).standard_normal((1, 3, 11)).astype(np.float32)
    logits_BTV[0, position, word] = number
    targets_BT, mask_BT = np.array([[2, 5, 7]], np.int32), np.array([[True, False, True]])
    return logits_BTV, Batch(np.ones_like(targets_BT), targets_BT, mask_BT, 3)


LOST = {
    "nan elsewhere": (np.nan, 0, 9),
    "nan for the target": (np.nan, 2, 7),
    "infinity elsewhere": (np.inf, 0, 9),
    "infinity for the target": (np.inf, 2, 7),
    "no chance for the target": (-np.inf, 0, 2),
}


@pytest.mark.needs("loss_of_logits")
@pytest.mark.alone
@pytest.mark.parametrize("given", LOST.values(), ids=LOST)
def test_a_logit_that_ends_at_a_target_reaches_the_loss(
    case: Case, candidate: Any, judge: Judge, given: tuple[float, int, int]
) -> None:
    """An impossible target costs infinitely many nats; NaN costs NaN."""
    logits_BTV, batch = given_logits(*given)
    nats = unless_refused(lambda: case.build(candidate).loss_of_logits(logits_BTV, batch)[0])
    if nats is not None:
        lost, ours = {"nats": np.array(True)}, {"nats": np.array(nats)}
        judge.report(lambda: require_none_finite(f"a logit of {given[0]} at a target", ours, lost))


@pytest.mark.needs("loss_of_logits")
@pytest.mark.canonical("pad_targets")
@pytest.mark.alone
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_logit_that_ends_at_no_target_does_not_matter(case: Case, judge: Judge, number: float) -> None:
    """What is not a target is left out, as in the reference; times 0 it would be NaN."""
    logits_BTV, batch = given_logits(number, 1, 5)
    judge(case, lambda t: {"nats": np.array(t.loss_of_logits(logits_BTV, batch)[0])})


@pytest.mark.needs("loss_of_logits")
@pytest.mark.canonical("pad_targets")
@pytest.mark.alone
def test_logits_of_thousands_cost_what_they_say(case: Case, candidate: Any, judge: Judge) -> None:
    """By hand: 10,000 nats for a wrong word that is certain, 0 for the right one."""
    logits_BTV, batch = given_logits(0.0, 0, 0)
    logits_BTV[:] = 0
    logits_BTV[0, 0, 9], logits_BTV[0, 2, 7] = 1e4, 1e4
    ours = case.build(candidate).loss_of_logits(logits_BTV, batch)
    judge.same_bits({"nats": ours[0], "targets": ours[1]}, {"nats": 1e4, "targets": 2})
