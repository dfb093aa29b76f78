"""Rung 14, generation: the same greedy tokens as PyTorch, and a cache that changes nothing."""

from __future__ import annotations

import numpy as np
import torch

from mlx_impl.generate import generate, generate_all
from tests.derived import FACTOR
from tests.ladder.conftest import Case
from tests.trainers.mlx_impl import NO_TOKEN

NUM_TOKENS = 20


def test_greedy_tokens_equal_the_reference(case: Case) -> None:
    """Twenty tokens, each decidable: its lead over the runner-up exceeds twice the rounding bound."""
    prompt = case.batch.inputs_BT[0].tolist()
    tokens, logits_NV = case.reference().greedy(prompt, NUM_TOKENS)
    text = np.array([prompt + tokens])
    logits32_NV = case.reference(torch.float32).logits(text)[0, len(prompt) - 1 : -1]
    bound = FACTOR * np.abs(logits32_NV - logits_NV).max()
    runner_up_N, best_N = np.sort(logits_NV, axis=-1)[:, -2:].T
    assert (best_N - runner_up_N > 2 * bound).all(), "undecidable: choose another seed"
    assert case.ours().greedy(prompt, NUM_TOKENS) == tokens


def test_the_cache_changes_no_greedy_token(case: Case) -> None:
    """Token for token what reading the whole text anew gives."""
    trainer = case.ours()
    prompt = case.batch.inputs_BT[0].tolist()
    text = list(prompt)
    for _ in range(NUM_TOKENS):
        text.append(int(trainer.logits(np.array([text]))[0, -1].argmax()))
    assert trainer.greedy(prompt, NUM_TOKENS) == text[len(prompt) :]


def test_prompts_answered_together_are_answered_as_alone(case: Case) -> None:
    """Unequal lengths, a beginning in common or none, twice the same: answers in the order of the prompts."""
    model = case.ours().model
    for prompts in (
        [[5, 7, 11], [2, 3], [13, 17, 19], [23, 29, 31, 37]],
        [[5, 7, 11], [5, 7, 2, 3], [5, 7, 13]],
        [[5, 7, 11], [5, 7, 11]],
        [],
    ):
        together = generate_all(model, prompts, max_tokens=8, eos_id=NO_TOKEN)
        assert together == [list(generate(model, p, 8, NO_TOKEN)) for p in prompts]


def test_the_end_of_turn_token_ends_an_answer_and_is_not_part_of_it(case: Case) -> None:
    """Each row of a group stops by itself."""
    model = case.ours().model
    prompts = [[5, 7, 11], [13, 17, 19]]
    free = generate_all(model, prompts, max_tokens=8, eos_id=NO_TOKEN)
    eos_id = free[0][3]
    expected = [row[: row.index(eos_id)] if eos_id in row else row for row in free]
    assert generate_all(model, prompts, max_tokens=8, eos_id=eos_id) == expected
    assert [list(generate(model, prompt, 8, eos_id)) for prompt in prompts] == expected
