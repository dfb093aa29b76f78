"""Rung 5, loss: a sum in nats and a number of targets; every target counts once, and nothing else counts.

The mean is taken once, as total sum over total count: a mean of means gives more weight to the targets of
short rows. MLX: `nn.losses.cross_entropy` neither shifts nor masks, and a mask that compares positions with
lengths is easily off by one: one padding target counted in each row can turn a loss of 0.7 nats into 2.2.
"""

from __future__ import annotations

from functools import partial
from math import log
from typing import Any

import numpy as np
import pytest
import torch

from mlx_impl.data import Batch
from tests.derived import within
from tests.lora_ladder.cases import (
    PROMPT_COUNTS,
    TOKEN_COUNTS,
    Case,
    common_beginnings,
    every_case,
    make_batch,
    random_rows,
    rows_of,
)
from tests.lora_ladder.examples import alone, packed, to_pack
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays


def sum_and_count(trainer: Any, batch: Batch) -> Arrays:
    nats, num_targets = trainer.loss(batch)
    return {"nats": np.array(nats), "num_targets": np.array(float(num_targets))}


@pytest.mark.needs("loss_of_logits")
@pytest.mark.canonical("pad_targets")
@pytest.mark.alone
def test_a_hand_worked_example(case: Case, candidate: Any, judge: Judge) -> None:
    """Two rows, three words. The model's probabilities and targets, by hand:

        row 0:  (1/2 1/4 1/4) -> 0: ln 2     (1/8 3/4 1/8) -> 2: ln 8     (masked)
        row 1:  (1/3 1/3 1/3) -> 1: ln 3     (masked)                      (masked)

    so the sum is ln 48 over 3 targets. A constant is added to the logits of each position, which must not
    matter. It is at most 100 and rounded once, and so is each of the 3 terms.
    """
    third = [1 / 3, 1 / 3, 1 / 3]
    p_BTV = np.array([[[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], third], [third, third, third]])
    shift_BT1 = np.array([[[5.0], [-3.0], [0.0]], [[100.0], [7.0], [0.0]]])
    logits_BTV = (np.log(p_BTV) + shift_BT1).astype(np.float32)
    targets_BT = np.array([[0, 2, 1], [1, 0, 2]], dtype=np.int32)
    mask_BT = np.array([[True, True, False], [True, False, False]])
    batch = Batch(np.ones_like(targets_BT), targets_BT, mask_BT, 6)
    nats, num_targets = case.build(candidate).loss_of_logits(logits_BTV, batch)
    judge.same_bits({"number of targets": num_targets}, {"number of targets": 3})
    judge.hold([within("nats", np.array(nats), np.array(log(48)), 3 * 100 * 2.0**-24, 3)])


@pytest.mark.needs("loss_of_logits")
@pytest.mark.canonical("pad_targets")
@pytest.mark.alone
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_loss_over_a_real_vocabulary_is_as_right_as_pytorchs(
    case: Case, candidate: Any, judge: Judge, spread: float
) -> None:
    """Over 49,152 words, within the tolerance that the error of PyTorch's own float32 loss gives."""
    rng = np.random.default_rng(7)
    logits_BTV = (spread * rng.standard_normal((2, 8, 49_152))).astype(np.float32)
    targets_BT, mask_BT = rng.integers(0, 49_152, (2, 8)), np.ones((2, 8), dtype=bool)
    batch = Batch(np.zeros_like(targets_BT), targets_BT, mask_BT, 16)
    nats, _ = case.build(candidate).loss_of_logits(logits_BTV, batch)
    single, exact = (
        case.build(judge.oracle(dtype)).loss_of_logits(logits_BTV, batch)[0]
        for dtype in (torch.float32, torch.float64)
    )
    judge.hold([within("nats", np.array(nats), np.array(exact), abs(single - exact), 2)])


@pytest.mark.needs("loss_of_logits")
@pytest.mark.alone
def test_the_loss_of_the_references_logits_equals_the_reference(case: Case, judge: Judge) -> None:
    """The loss alone: it is given PyTorch's logits, so the forward pass plays no part."""
    logits_BTV = case.build(judge.oracle(torch.float64)).logits(case.batch.inputs_BT).astype(np.float32)
    judge(case, lambda t: {"nats": np.array(t.loss_of_logits(logits_BTV, case.batch)[0])})


@every_case
def test_the_loss_equals_the_reference(case: Case, judge: Judge, candidate: Any) -> None:
    """The same sum of nats over exactly the same number of targets, in rows of unequal length."""
    ours, expected = (case.build(t).loss(case.batch)[1] for t in (candidate, judge.oracle(torch.float64)))
    judge.same_bits({"number of targets": ours}, {"number of targets": expected})
    judge(case, lambda trainer: sum_and_count(trainer, case.batch))


@pytest.mark.needs("exact")
@every_case
def test_in_float64_the_loss_equals_the_reference_to_1e_12(case: Case, judge: Judge) -> None:
    """The algebra is the same, so the difference in float32 was rounding."""
    judge.exactly(case, lambda trainer: sum_and_count(trainer, case.batch))


@pytest.mark.canonical("pad_targets")
def test_the_targets_are_the_tokens_after_the_prompts(case: Case, candidate: Any, judge: Judge) -> None:
    """Counted by hand: the lengths of the rows minus the lengths of the prompts."""
    expected = sum(TOKEN_COUNTS) - sum(PROMPT_COUNTS)
    ours = case.build(candidate).loss(case.batch)[1]
    judge.same_bits({"number of targets": ours}, {"number of targets": expected})


def test_a_row_without_targets_adds_nothing_to_the_loss(case: Case, judge: Judge) -> None:
    """With one row fully masked, sum and count of the batch are those of the other rows."""
    rows = random_rows(case.spec.vocab_size, TOKEN_COUNTS)
    masked = make_batch(rows, (5, TOKEN_COUNTS[1], 9))
    judge(case, lambda trainer: sum_and_count(trainer, masked))
    judge.alike(
        (case, lambda trainer: sum_and_count(trainer, masked)),
        (case, lambda trainer: sum_and_count(trainer, rows_of(masked, [0, 2]))),
    )


def test_the_loss_of_rows_with_a_common_beginning_equals_the_reference(case: Case, judge: Judge) -> None:
    """A trainer may compute once what rows have in common, and only that."""
    for judge.subject, batch in common_beginnings(case.spec.vocab_size).items():
        judge(case, partial(sum_and_count, batch=batch))


@pytest.mark.canonical("pad_targets")
def test_the_tokens_used_as_padding_do_not_matter(case: Case, candidate: Any, judge: Judge) -> None:
    """Random tokens as padding change no bit of the loss, so no padding target is counted."""
    inputs_BT, targets_BT, mask_BT, num_tokens = case.batch[:4]
    noise_BT = np.random.default_rng(5).integers(0, case.spec.vocab_size, inputs_BT.shape)
    noisy_inputs_BT = np.where(inputs_BT == 0, noise_BT, inputs_BT).astype(np.int32)
    noisy_targets_BT = np.where(targets_BT == 0, noise_BT, targets_BT).astype(np.int32)
    assert (noisy_targets_BT != targets_BT).any()
    noisy = Batch(noisy_inputs_BT, noisy_targets_BT, mask_BT, num_tokens)
    (noisy_nats, noisy_count), (nats, count) = map(case.build(candidate).loss, (noisy, case.batch))
    judge.same_bits({"targets": noisy_count}, {"targets": count})
    judge.same_computation({"nats": noisy_nats}, {"nats": nats}, case.longest_sum)


@pytest.mark.needs("evaluate")
def test_the_loss_over_a_data_set_weighs_every_target_alike(case: Case, judge: Judge) -> None:
    """Batches of 9, 3 and 2 targets: total nats over total targets, as in the reference."""
    batches = [rows_of(case.batch, [row]) for row in range(3)]
    judge(case, lambda trainer: {"mean nats": np.array(trainer.evaluate(batches))})


@pytest.mark.needs("evaluate")
def test_the_loss_over_a_data_set_does_not_depend_on_the_batch_size(case: Case, judge: Judge) -> None:
    """Three batches of one row, or one batch of all three."""
    alone = [rows_of(case.batch, [row]) for row in range(3)]
    judge.alike(
        (case, lambda trainer: {"mean nats": np.array(trainer.evaluate(alone))}),
        (case, lambda trainer: {"mean nats": np.array(trainer.evaluate([case.batch]))}),
    )


@pytest.mark.needs("micro_batches")
@pytest.mark.canonical("pad_targets")
@pytest.mark.parametrize("case", ["untied", "sliding window", "llama3 rope", "dora"], indirect=True)
def test_the_loss_of_packed_rows_is_that_of_their_examples_alone(
    case: Case, candidate: Any, judge: Judge
) -> None:
    """Each token attends its own example only, and sees it at the positions that it has alone."""
    for judge.subject, examples in to_pack().items():
        batch = packed(case, candidate, examples)
        ours = sum_and_count(case.build(candidate), batch)
        judge.given(ours, case, partial(sum_and_count, batch=alone(examples)))
