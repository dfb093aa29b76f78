"""Rung 4, loss: a sum in nats and a number of targets; every target counts once, and nothing else does."""

from __future__ import annotations

from math import log

import mlx.core as mx
import numpy as np
import torch

from mlx_impl.data import Batch, Example, make_batch
from mlx_impl.loss import next_token_nats
from tests.derived import assert_within_rounding
from tests.ladder.conftest import PROMPT_COUNTS, TOKEN_COUNTS, Case


def test_a_hand_worked_example() -> None:
    """Two rows, three words. The model's probabilities and targets, by hand:

        row 0:  (1/2 1/4 1/4) -> 0: ln 2     (1/8 3/4 1/8) -> 2: ln 8     (masked)
        row 1:  (1/3 1/3 1/3) -> 1: ln 3     (masked)                      (masked)

    so the sum is ln 48 over 3 targets. The logits carry a constant each, which must not matter.
    """
    third = [1 / 3, 1 / 3, 1 / 3]
    p_BTV = np.array([[[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], third], [third, third, third]])
    shift_BT1 = np.array([[[5.0], [-3.0], [0.0]], [[100.0], [7.0], [0.0]]])
    logits_BTV = mx.array((np.log(p_BTV) + shift_BT1).astype(np.float32))
    targets_BT = mx.array([[0, 2, 1], [1, 0, 2]])
    mask_BT = mx.array([[True, True, False], [True, False, False]])
    nats, num_targets = next_token_nats(logits_BTV.flatten(0, 1), targets_BT.flatten(), mask_BT.flatten())
    assert num_targets.item() == 3
    assert abs(nats.item() - log(48)) <= 3 * 100 * 2.0**-24  # 3 terms, logits up to 100, rounded once


def test_the_loss_equals_the_reference(case: Case) -> None:
    """The same sum of nats over exactly the same number of targets, of unequal rows."""
    nats, num_targets = case.ours().loss(case.batch)
    nats32, _ = case.reference(torch.float32).loss(case.batch)
    nats64, num_targets64 = case.reference().loss(case.batch)
    assert num_targets == num_targets64 == sum(TOKEN_COUNTS) - sum(PROMPT_COUNTS)
    ours, ref32, ref64 = ({"loss": np.array([value])} for value in (nats, nats32, nats64))
    assert_within_rounding("rung 4, loss", ours, ref32, ref64, case.longest_sum)


def test_the_loss_over_a_data_set_weighs_every_target_alike(case: Case) -> None:
    """Batches of 9, 3 and 2 targets: the sum of the sums over the sum of the counts, as in the reference."""
    inputs_BT, targets_BT, mask_BT, _ = case.batch
    rows = [slice(row, row + 1) for row in range(3)]
    batches = [Batch(inputs_BT[row], targets_BT[row], mask_BT[row], 0) for row in rows]
    ours = {"loss": np.array([case.ours().evaluate(batches)])}
    ref32 = {"loss": np.array([case.reference(torch.float32).evaluate(batches)])}
    ref64 = {"loss": np.array([case.reference().evaluate(batches)])}
    assert_within_rounding("rung 4, evaluation", ours, ref32, ref64, case.longest_sum)
    nats, num_targets = case.reference().loss(case.batch)
    assert abs(ref64["loss"][0] - nats / num_targets) < 1e-12


def test_the_tokens_used_as_padding_do_not_matter(case: Case) -> None:
    """Random padding, to the bit: the pad target that other trainers count cannot be counted."""
    inputs_BT, targets_BT, mask_BT, num_tokens = case.batch
    rng = np.random.default_rng(5)
    padding_BT = np.arange(inputs_BT.shape[1]) >= np.array(TOKEN_COUNTS)[:, None] - 1
    noise_BT = rng.integers(0, case.spec.vocab_size, inputs_BT.shape)
    noisy_inputs_BT = np.where(np.roll(padding_BT, 1, 1) & padding_BT, noise_BT, inputs_BT)
    noisy_targets_BT = np.where(padding_BT, noise_BT, targets_BT)
    assert (noisy_targets_BT != targets_BT).any()
    noisy = Batch(noisy_inputs_BT, noisy_targets_BT, mask_BT, num_tokens)
    assert case.ours().loss(noisy) == case.ours().loss(case.batch)


def test_a_longer_neighbour_leaves_a_rows_targets_as_they_are() -> None:
    """It widens the batch, and that is all."""
    short = Example((3, 1, 4), (False, True, True))
    long = Example(tuple(range(1, 30)), (True,) * 29)
    alone, beside = make_batch([short]), make_batch([short, long])
    assert alone.mask_BT[0].sum() == beside.mask_BT[0].sum() == 2
    assert beside.targets_BT[0][beside.mask_BT[0]].tolist() == [1, 4]
