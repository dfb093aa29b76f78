"""Decoding with a key/value cache, greedy or sampled.

Prompts of unequal length go through the model in step, each reading its own next token or what it answered;
nothing is padded, so a batch needs no mask. What all prompts begin with, such as the system prompt, is read
once. Differs from reference/generate.py: the cache, batches, sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import copy
from itertools import takewhile

import mlx.core as mx

from .model import CausalLM, KeyValueCache, in_evaluation
from .sampling import GREEDY, Sampling, next_tokens

MAX_ROWS = 64  # prompts decoded together


def advance(
    model: CausalLM, caches: list[KeyValueCache], tokens_BT: mx.array, sampling: Sampling = GREEDY
) -> mx.array:
    """Read the tokens; the next token of every row."""
    x_BTD = model.model(tokens_BT, caches)
    next_B = next_tokens(model.head(x_BTD[:, -1]), sampling)
    mx.eval(next_B)
    return next_B


def empty_caches(model: CausalLM) -> list[KeyValueCache]:
    return [KeyValueCache() for _ in model.model.layers]


def read_prefix(model: CausalLM, prompts: Sequence[Sequence[int]]) -> tuple[int, list[KeyValueCache]]:
    """How many tokens all prompts begin with (at least one is left of each), and their keys and values."""
    shortest = min(len(prompt) for prompt in prompts)
    columns = zip(*(prompt[: shortest - 1] for prompt in prompts), strict=True)
    same = [len(set(column)) == 1 for column in columns]
    num_shared = (*same, False).index(False)
    caches = empty_caches(model)
    if num_shared:
        mx.eval(model.model(mx.array([list(prompts[0][:num_shared])]), caches))
    return num_shared, caches


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    max_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """The tokens of one answer as they come; a stop token ends it and is not yielded."""
    if not prompt:
        raise ValueError("the prompt must have at least one token, got none")
    caches, tokens_BT = empty_caches(model), mx.array([list(prompt)])
    with in_evaluation(model):
        for _ in range(max_tokens):
            next_B = advance(model, caches, tokens_BT, sampling)
            token = int(next_B.item())
            if token in stop_ids:
                return
            yield token
            tokens_BT = next_B[:, None]


def generate_all(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Collection[int],
    watched: Callable[[range, int], Iterable[int]] = lambda groups, count: groups,
) -> list[list[int]]:
    """The greedy answer to every prompt, in the order of the prompts.

    Prompts are decoded in groups; `watched` passes the groups on, and is told their number, to show progress.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with in_evaluation(model):
        num_shared, prefix = read_prefix(model, prompts) if prompts else (0, [])
        starts = range(0, len(by_length), MAX_ROWS)
        for start in watched(starts, len(starts)):
            rows = by_length[start : start + MAX_ROWS]
            caches, chosen = [copy(cache) for cache in prefix], [prompts[row] for row in rows]
            texts = march(model, caches, num_shared, chosen, max_tokens, stop_ids)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
    return answers


def march(
    model: CausalLM,
    caches: list[KeyValueCache],
    num_seen: int,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[list[int]]:
    """Rows of unequal length in step: at each, a row reads its prompt while it lasts, then its own answer."""
    texts = [list(prompt) for prompt in prompts]
    limits = [len(prompt) + max_tokens for prompt in prompts]
    shortest = min(map(len, prompts))
    tokens_BT = mx.array([text[num_seen:shortest] for text in texts])
    for num_seen in range(shortest, max(limits)):
        for text, token in zip(texts, advance(model, caches, tokens_BT).tolist(), strict=True):
            if len(text) == num_seen:  # its prompt is read, so this is its answer
                text.append(token)
        replies = [text[limit - max_tokens : limit] for text, limit in zip(texts, limits, strict=True)]
        if all(len(reply) == max_tokens or any(token in stop_ids for token in reply) for reply in replies):
            break
        tokens_BT = mx.array([[text[num_seen]] for text in texts])
    return [until(reply, stop_ids) for reply in replies]


def until(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    return list(takewhile(lambda token: token not in stop_ids, tokens))
