"""Rung 3, forward: from the same weights PyTorch's logits, and an adapter with B = 0 is as if absent."""

from __future__ import annotations

import numpy as np
import torch

from tests.derived import assert_within_rounding
from tests.ladder.conftest import Case
from tests.trainers.mlx_impl import MlxTrainer


def test_logits_with_an_adapter_equal_the_reference(case: Case) -> None:
    """Grouped heads, a head_dim that is not width / heads, tied and untied heads, B != 0."""
    tokens_BT = case.batch.inputs_BT
    ours = {"logits": case.ours().logits(tokens_BT)}
    ref32 = {"logits": case.reference(torch.float32).logits(tokens_BT)}
    ref64 = {"logits": case.reference().logits(tokens_BT)}
    assert_within_rounding("rung 3, forward", ours, ref32, ref64, case.longest_sum)


def test_an_adapter_with_zero_b_is_exactly_the_base_model(case: Case) -> None:
    """x A 0 adds exact zeros: not a bit of the logits differs."""
    tokens_BT = case.batch.inputs_BT
    base = MlxTrainer(case.spec, case.weights).logits(tokens_BT)
    np.testing.assert_array_equal(case.with_zero_b().ours().logits(tokens_BT), base)


def test_an_adapter_with_nonzero_b_is_not(case: Case) -> None:
    """The control of the claim above: the adapter is really in the path."""
    tokens_BT = case.batch.inputs_BT
    base = MlxTrainer(case.spec, case.weights).logits(tokens_BT)
    assert np.abs(case.ours().logits(tokens_BT) - base).max() > 0.1


def test_a_later_token_changes_no_earlier_logit(case: Case) -> None:
    """Causality, to the bit."""
    tokens_BT = case.batch.inputs_BT.copy()
    before = case.ours().logits(tokens_BT)
    tokens_BT[:, -1] = (tokens_BT[:, -1] + 1) % case.spec.vocab_size
    after = case.ours().logits(tokens_BT)
    np.testing.assert_array_equal(after[:, :-1], before[:, :-1])
    assert (after[:, -1] != before[:, -1]).any()
