"""Rung 19, generation: the same greedy tokens as PyTorch; the key/value cache changes nothing.

A token is compared only if its logit leads the runner-up by more than rounding can change. MLX: with a
key/value cache, rope needs the number of cached tokens as its offset; rows of unequal length share a batch
and a cache, and each row must stop at its own end token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mlx_impl.config import TrainConfig
from tests.derived import FACTOR, NUM_DRAWS
from tests.lora_ladder.cases import TOKEN_COUNTS, Case, Draw
from tests.lora_ladder.chance import FALSE_ALARM
from tests.lora_ladder.judge import Judge

NUM_TOKENS = 20
NO_TOKEN = -1  # an end token that never occurs
each_case = pytest.mark.parametrize(
    "case", ["untied", "tied", "llama3 rope", "sliding window"], indirect=True
)


def prompt_of(case: Case) -> list[int]:
    """The last row, with which in draw 0 every token leads by more than rounding."""
    return case.batch.inputs_BT[-1, : TOKEN_COUNTS[-1] - 1].tolist()


@pytest.mark.needs("greedy")
@each_case
def test_greedy_tokens_equal_the_reference(case: Case, candidate: Any, judge: Judge) -> None:
    """Twenty tokens, up to the first whose lead is within rounding; at least ten must be compared."""
    prompt = prompt_of(case)
    expected = case.build(judge.oracle(torch.float64)).greedy(prompt, NUM_TOKENS)
    decided = num_decided(case, prompt + expected, len(prompt) - 1, judge)
    least = NUM_TOKENS / 2 if Draw.number else NUM_TOKENS  # in the draw that the documents show, all of them
    assert decided >= least, f"undecidable after {decided} tokens: choose another draw"
    assert case.build(candidate).greedy(prompt, NUM_TOKENS)[:decided] == expected[:decided]


def num_decided(case: Case, text: list[int], start: int, judge: Judge) -> int:
    """The number of tokens from `start` on before the first that leads by at most twice its tolerance."""
    oracle64 = judge.oracle(torch.float64)
    exact, *drawn = (
        c.build(oracle64).logits(np.array([text]))[0, start:-1]
        for c in (case, *(case.moved(seed) for seed in range(NUM_DRAWS)))
    )
    noise_NV = np.sqrt(np.mean([np.square(logits_NV - exact) for logits_NV in drawn], axis=0))
    runner_up_N, best_N = np.sort(exact, axis=-1)[:, -2:].T
    is_decided_N = best_N - runner_up_N > 2 * FACTOR * noise_NV.max(axis=-1)
    return len(is_decided_N) if is_decided_N.all() else int(np.argmin(is_decided_N))


@pytest.mark.needs("greedy")
@each_case
def test_the_cache_changes_no_greedy_token(case: Case, candidate: Any) -> None:
    """The tokens are those that a forward pass over the whole text gives at every token."""
    trainer, prompt = case.build(candidate), prompt_of(case)
    text = list(prompt)
    for _ in range(NUM_TOKENS):
        text.append(int(trainer.logits(np.array([text]))[0, -1].argmax()))
    assert trainer.greedy(prompt, NUM_TOKENS) == text[len(prompt) :]


@pytest.mark.needs("greedy")
def test_dropout_is_off_in_generation(case: Case, candidate: Any) -> None:
    """The tokens equal those without dropout, before and after an update."""
    without, dropping, prompt = (
        case.build(candidate),
        case.with_dropout(0.5).build(candidate),
        prompt_of(case),
    )
    for _ in range(2):
        assert dropping.greedy(prompt, NUM_TOKENS) == without.greedy(prompt, NUM_TOKENS)
        dropping.train([[case.batch]], TrainConfig(iters=1, learning_rate=0.0))


@pytest.mark.needs("greedy", "greedy_all")
@pytest.mark.parametrize(
    "prompts",
    [
        [[5, 7, 11], [2, 3], [13, 17, 19], [23, 29, 31, 37]],
        [[5, 7, 11], [5, 7, 2, 3], [5, 7, 13]],
        [[5, 7, 11, 13, 17], [5, 7, 2, 3, 19, 23], [5, 7, 41, 29, 31]],
        [[5, 7, 11], [5, 7, 11]],
        [],
    ],
    ids=["unequal", "common beginning", "long after a common beginning", "twice the same", "none"],
)
def test_batched_prompts_get_the_answers_that_they_get_alone(
    case: Case, candidate: Any, prompts: list[list[int]]
) -> None:
    """The answers come in the order of the prompts."""
    trainer = case.build(candidate)
    together = trainer.greedy_all(prompts, 8, NO_TOKEN)
    assert together == [trainer.greedy(prompt, 8) for prompt in prompts]


@pytest.mark.needs("greedy_all")
def test_the_end_token_ends_an_answer_and_is_not_part_of_it(case: Case, candidate: Any) -> None:
    """Each row of a batch stops at its own end token."""
    trainer, prompts = case.build(candidate), [[5, 7, 11], [13, 17, 19]]
    free = trainer.greedy_all(prompts, 8, NO_TOKEN)
    end = free[0][3]
    expected = [row[: row.index(end)] if end in row else row for row in free]
    assert trainer.greedy_all(prompts, 8, end) == expected


@pytest.mark.needs("greedy_all")
def test_an_end_token_in_the_prompt_ends_nothing(case: Case, candidate: Any, judge: Judge) -> None:
    """As in a conversation of several turns: every prompt has one, and only the answer's own counts."""
    trainer = case.build(candidate)
    for end in range(case.spec.vocab_size):
        prompts = [[5, end, 11], [13, end, 19]]
        free = trainer.greedy_all(prompts, 8, NO_TOKEN)
        if all(end not in row for row in free):
            break
    assert trainer.greedy_all(prompts, 8, end) == free


LOGITS_V = np.log([0.4, 0.3, 0.2, 0.07, 0.03])
NUM_SAMPLED = 20_000
# temperature, top_p -> the probabilities by hand: first p^(1 / temperature), then the nucleus
DISTRIBUTIONS = {
    (1.0, 1.0): [0.4, 0.3, 0.2, 0.07, 0.03],
    (1.0, 0.5): [0.4 / 0.7, 0.3 / 0.7, 0, 0, 0],
    (0.5, 1.0): np.square([0.4, 0.3, 0.2, 0.07, 0.03]) / sum(np.square([0.4, 0.3, 0.2, 0.07, 0.03])),
    (0.5, 0.8): [0.64, 0.36, 0, 0, 0],  # of 16 + 9 + 4 + 0.58 the first two are 0.85
    (2.0, 0.6): np.sqrt([0.4, 0.3, 0.2, 0, 0]) / sum(np.sqrt([0.4, 0.3, 0.2])),
}


@pytest.mark.needs("greedy", "greedy_all")
def test_answers_follow_the_factors(case: Case, candidate: Any) -> None:
    """After an update they are those of a new trainer with the new factors: nothing is kept of the old."""
    prompts = [[5, 7, 11], [5, 7, 2, 3]]
    trainer = case.build(candidate)
    before = trainer.greedy_all(prompts, 8, NO_TOKEN)
    trainer.train([[case.batch]], TrainConfig(iters=1, learning_rate=0.5))
    moved = replace(case, factors=trainer.factors()).build(candidate)
    after = trainer.greedy_all(prompts, 8, NO_TOKEN)
    assert after == moved.greedy_all(prompts, 8, NO_TOKEN) != before
    assert after == [trainer.greedy(prompt, 8) for prompt in prompts]


@pytest.mark.needs("sample")
def test_every_draw_is_a_new_one(case: Case, candidate: Any) -> None:
    """The next 64 tokens of 61 equal ones are not the last 64 again: 61^-64 that they are by chance."""
    trainer, logits_V = case.build(candidate), np.zeros(61, np.float32)
    first, second = (list(trainer.sample(logits_V, 1.0, 1.0, 64)) for _ in range(2))
    assert first != second


@pytest.mark.needs("sample")
@pytest.mark.parametrize(("temperature", "top_p"), DISTRIBUTIONS)
def test_sampled_tokens_have_the_distribution_asked_for(
    case: Case, candidate: Any, judge: Judge, temperature: float, top_p: float
) -> None:
    """The temperature first, then the nucleus, as in transformers (Holtzman et al. 2020, section 3.1).

    Each share of 20,000 draws is within Hoeffding's bound of its probability; outside the nucleus it is 0.
    """
    trainer = case.build(candidate)
    tokens = trainer.sample(LOGITS_V.astype(np.float32), temperature, top_p, NUM_SAMPLED)
    ours, expected = (
        np.bincount(tokens, minlength=5) / NUM_SAMPLED,
        np.array(DISTRIBUTIONS[temperature, top_p]),
    )
    bound = np.where(expected > 0, np.sqrt(np.log(2 * 5 / FALSE_ALARM) / (2 * NUM_SAMPLED)), 0)
    judge.claim(
        bool((abs(ours - expected) <= bound).all()),
        f"the shares of the tokens are {ours}, expected {expected} within {bound.max():.3f}",
    )


@pytest.mark.needs("sample", "in_bfloat16")
def test_the_nucleus_of_many_tokens_in_bfloat16_is_summed_in_float32(
    case: Case, candidate: Any, judge: Judge
) -> None:
    """4096 small probabilities, a quarter of which together are half: a sum in bfloat16 stops growing early.

    The logits are exact in bfloat16, and no token near the edge of the nucleus is drawn or expected.
    """
    likely, number = 1024, 4096
    logits_V = np.zeros(number, dtype=np.float32)
    logits_V[::4] = 1.25  # these are 0.54 of the whole, more than top_p
    with candidate.in_bfloat16():
        trainer = case.build(candidate)
    tokens = np.array(trainer.sample(logits_V, 1.0, 0.5, NUM_SAMPLED))
    others = int((tokens % 4 > 0).sum())
    judge.claim(
        others == 0, f"{others} of {NUM_SAMPLED} tokens are none of the {likely} likelier, expected none"
    )
