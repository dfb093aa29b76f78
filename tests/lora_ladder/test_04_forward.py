"""Rung 4, forward: the same weights give PyTorch's hidden states and logits.

The cases cover every architecture switch and every kind of adapter, with B != 0. Hidden states are compared
in the order of execution, so the first one out of tolerance shows where the forward pass goes wrong. MLX:
`mx.fast` kernels take their conventions as arguments (rope's pairing, its base or its periods, the attention
scale, the causal mask), and a wrong one gives smooth, plausible, wrong logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.lora_ladder.cases import Case, every_architecture, every_case
from tests.lora_ladder.judge import Judge


@pytest.mark.needs("hidden_states")
@every_architecture
def test_hidden_states_equal_the_reference_in_the_order_of_execution(case: Case, judge: Judge) -> None:
    """After the embedding, each block, and the last norm."""
    judge(case, lambda trainer: trainer.hidden_states(case.batch.inputs_BT))


@every_case
def test_logits_equal_the_reference(case: Case, judge: Judge) -> None:
    """Grouped heads, any head_dim, tied and untied heads, biases, norms, scaled rope, every LoRA variant."""
    judge(case, lambda trainer: {"logits": trainer.logits(case.batch.inputs_BT)})


def test_a_window_of_any_size_gives_the_logits_of_the_reference(case: Case, judge: Judge) -> None:
    """One token, which sees itself alone; two; all but the first one of the row; and all."""
    num_tokens = case.batch.inputs_BT.shape[1]
    for size in (1, 2, num_tokens - 1, num_tokens):
        judge.subject = f"a window of {size} for rows of {num_tokens}"
        windowed = replace(case, spec=replace(case.spec, sliding_window=size))
        judge(windowed, lambda trainer: {"logits": trainer.logits(case.batch.inputs_BT)})


@pytest.mark.needs("exact")
@every_case
def test_in_float64_logits_equal_the_reference_to_1e_12(case: Case, judge: Judge) -> None:
    """The algebra is the same, so the difference in float32 was rounding."""
    judge.exactly(case, lambda trainer: {"logits": trainer.logits(case.batch.inputs_BT)})


@every_architecture
def test_a_later_token_changes_no_earlier_logit(case: Case, candidate: Any, judge: Judge) -> None:
    """The attention mask is causal, to the bit."""
    tokens_BT = case.batch.inputs_BT.copy()
    before = case.build(candidate).logits(tokens_BT)
    tokens_BT[:, -1] = (tokens_BT[:, -1] + 1) % case.spec.vocab_size
    after = case.build(candidate).logits(tokens_BT)
    judge.same_computation({"logits": after[:, :-1]}, {"logits": before[:, :-1]}, case.longest_sum)
    assert (after[:, -1] != before[:, -1]).any()


def test_a_row_does_not_depend_on_the_other_rows(case: Case, judge: Judge) -> None:
    """Its logits in a batch are those that it has alone."""
    tokens_BT = case.batch.inputs_BT
    judge.alike(
        (case, lambda trainer: {"logits": trainer.logits(tokens_BT)[1:2]}),
        (case, lambda trainer: {"logits": trainer.logits(tokens_BT[1:2])}),
    )
