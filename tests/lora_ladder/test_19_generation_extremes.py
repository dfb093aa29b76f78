"""Rung 19, generation: many prompts, very unequal prompts, and answers that cross a cache's block.

A trainer may decode prompts in batches and grow its key/value cache in blocks, of 64 or 256 tokens, say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.lora_ladder.cases import Case, Draw, random_rows
from tests.lora_ladder.extremes import ENDS, long_rows, looking_back, many_rows, unless_refused, with_number
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.test_19_generation import NO_TOKEN, num_decided

FEW = 2


def alone(trainer: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    return [trainer.greedy(prompt, num_tokens) for prompt in prompts]


@pytest.mark.needs("greedy", "greedy_all")
@pytest.mark.parametrize("count", [1, 130])
def test_each_of_many_prompts_gets_the_answer_that_it_gets_alone(candidate: Any, count: int) -> None:
    """One prompt, and around the sizes of batches; the answers come in the order of the prompts."""
    case = many_rows()
    trainer = case.build(candidate)
    lengths = [1 + 7 * number % 5 for number in range(count)]
    prompts = random_rows(case.spec.vocab_size, lengths)
    together = trainer.greedy_all(prompts, FEW, NO_TOKEN)
    wrong = [number for number, one in enumerate(alone(trainer, prompts, FEW)) if together[number] != one]
    assert not wrong, f"of {count} prompts {len(wrong)} get another answer; the first is number {wrong[0]}"


@pytest.mark.needs("greedy", "greedy_all")
@pytest.mark.parametrize("case", ["untied", "sliding window"], indirect=True)
def test_very_unequal_prompts_get_the_answers_that_they_get_alone(case: Case, candidate: Any) -> None:
    """From one token to 129: neither padding nor a long neighbour changes an answer.

    Nor do they after a common beginning, where a short prompt's window still sees the last of it.
    """
    trainer, prompts = case.build(candidate), random_rows(case.spec.vocab_size, (129, 1, 40, 2))
    assert trainer.greedy_all(prompts, 8, NO_TOKEN) == alone(trainer, prompts, 8)
    (beginning,) = random_rows(case.spec.vocab_size, (20,), seed=47)
    prompts = [beginning + prompt for prompt in prompts]
    assert trainer.greedy_all(prompts, 8, NO_TOKEN) == alone(trainer, prompts, 8)


@pytest.mark.needs("greedy_all")
def test_each_of_many_prompts_ends_at_its_own_end(candidate: Any) -> None:
    """In a second batch too."""
    case = many_rows()
    trainer = case.build(candidate)
    prompts = random_rows(case.spec.vocab_size, [2 + number % 3 for number in range(70)])
    free = trainer.greedy_all(prompts, FEW, NO_TOKEN)
    end = free[-1][1]
    expected = [row[: row.index(end)] if end in row else row for row in free]
    assert trainer.greedy_all(prompts, FEW, end) == expected


@pytest.mark.needs("greedy")
@pytest.mark.parametrize("length", [60, 252, 508, 1020])
@pytest.mark.parametrize("make", [long_rows, looking_back], ids=["all tokens", "the last tokens"])
def test_greedy_tokens_across_a_block_of_the_cache_equal_the_reference(
    candidate: Any, judge: Judge, make: Callable[[], Case], length: int
) -> None:
    """Eight tokens from just before 64, 256, 512 or 1,024 tokens; compared while the lead is clear.

    In one model the answers depend on the whole prompt. In the other they depend on the last few tokens, so a
    key that is lost or written twice shows.
    """
    case = make()
    (prompt,) = random_rows(case.spec.vocab_size, (length,))
    expected = case.build(judge.oracle(torch.float64)).greedy(prompt, 8)
    decided = num_decided(case, prompt + expected, length - 1, judge)
    assert Draw.number or decided > 4, "undecidable before the block ends"
    assert case.build(candidate).greedy(prompt, 8)[:decided] == expected[:decided]


@pytest.mark.needs("greedy")
def test_one_token_is_a_prompt(case: Case, candidate: Any, judge: Judge) -> None:
    """The shortest one."""
    expected = case.build(judge.oracle(torch.float64)).greedy([5], 2)
    decided = num_decided(case, [5, *expected], 0, judge)
    assert case.build(candidate).greedy([5], 2)[:decided] == expected[:decided]


@pytest.mark.needs("greedy_all")
def test_no_prompt_has_no_answer(case: Case, candidate: Any) -> None:
    """An empty list for an empty list; and no tokens where none are asked for."""
    trainer = case.build(candidate)
    assert trainer.greedy_all([], 3, NO_TOKEN) == []
    assert np.array(trainer.greedy_all([[5, 7], [2, 3]], 0, NO_TOKEN)).size == 0


@pytest.mark.needs("greedy")
@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
def test_a_model_whose_logits_are_not_finite_gives_no_answer(
    case: Case, candidate: Any, judge: Judge, number: float
) -> None:
    """The argmax of NaN is some token, often 0: an answer of exclamation marks. It must be refused."""
    trainer = with_number(case, "model.norm.weight", number).build(candidate)
    require_refused(judge, lambda: trainer.greedy([5, 7], 3))


@pytest.mark.needs("greedy_all")
@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
def test_one_row_whose_logits_are_not_finite_is_refused_too(
    case: Case, candidate: Any, judge: Judge, number: float
) -> None:
    """Only the embedding of a token in the second prompt is ruined."""
    trainer = with_number(case, "model.embed_tokens.weight", number, (3, 0)).build(candidate)
    require_refused(judge, lambda: trainer.greedy_all([[5, 7], [2, 3]], 3, NO_TOKEN))


def require_refused(judge: Judge, act: Callable[[], object]) -> None:
    answer = unless_refused(act)
    judge.claim(answer is None, f"logits that are not finite must be refused, got the answer {answer}")
