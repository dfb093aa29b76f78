"""Greedy decoding of many prompts in batches, their shared prefix read once.

The prompts of a batch end at the same place: a shorter one has a gap before it, which nothing attends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import takewhile

import mlx.core as mx

from ..model import CausalLM, in_evaluation
from .answer import require_tokens, steps
from .kv_cache import KVCache
from .packed_modules import unpacking_first
from .reading import Gap, read_prompt

MAX_ROWS = 64  # prompts of a batch

Prompts = Sequence[Sequence[int]]


def generate_all(
    model: CausalLM,
    prompts: Prompts,
    max_tokens: int,
    stop_ids: Collection[int],
    show_batches: Callable[[range, int], Iterable[int]] = lambda starts, count: starts,
    show_lengths: Callable[[range], Iterable[int]] = lambda lengths: lengths,
) -> list[list[int]]:
    """The greedy answer to every prompt, in the order of the prompts; ValueError for an empty one.

    Up to MAX_ROWS prompts of similar length are a batch. Two arguments show progress, and yield what they
    get: `show_batches(starts, count)` where each batch starts, or of only some of them, the others' answers
    staying empty; `show_lengths(lengths)`, within a batch, the length of the text, one more for each token.
    """
    for prompt in prompts:
        require_tokens(prompt)
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with in_evaluation(model), unpacking_first(model):
        prefix = read_prefix(model, prompts) if prompts else []
        starts = range(0, len(by_length), MAX_ROWS)
        for start in show_batches(starts, len(starts)):
            rows = by_length[start : start + MAX_ROWS]
            caches, batch = [cache.for_rows(len(rows)) for cache in prefix], [prompts[row] for row in rows]
            replies = decode_batch(model, caches, batch, max_tokens, stop_ids, show_lengths)
            for row, reply in zip(rows, replies, strict=True):
                answers[row] = reply
    return answers


def read_prefix(model: CausalLM, prompts: Prompts) -> list[KVCache]:
    """Caches of one row with the prefix that all prompts share; at least one token of each is left."""
    shortest = min(len(prompt) for prompt in prompts)
    columns = zip(*(prompt[: shortest - 1] for prompt in prompts), strict=True)
    num_shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    caches = [KVCache() for _ in model.model.layers]
    if num_shared:
        mx.eval(read_prompt(model, mx.array([list(prompts[0][:num_shared])]), caches))
    return caches


def decode_batch(
    model: CausalLM,
    caches: list[KVCache],
    prompts: Prompts,
    max_tokens: int,
    stop_ids: Collection[int],
    show_lengths: Callable[[range], Iterable[int]] = lambda lengths: lengths,
) -> list[list[int]]:
    """The greedy answers; the caches hold what has been read of every prompt."""
    longest, num_read = max(map(len, prompts)), caches[0].num_tokens
    gaps = [longest - len(prompt) for prompt in prompts]
    gap = Gap(num_read, mx.array(gaps)) if any(gaps) else None
    # A gap holds tokens of its own row: should they give NaN, only that row has it.
    rows = [
        [prompt[num_read]] * num + list(prompt[num_read:]) for prompt, num in zip(prompts, gaps, strict=True)
    ]
    found = steps(model, caches, mx.array(rows), max_tokens, gap)
    lengths = show_lengths(range(longest, longest + max_tokens))
    replies = until_all_stop((tokens for _, tokens in zip(lengths, found, strict=False)), len(rows), stop_ids)
    return [before_stop(reply, stop_ids) for reply in replies]


def until_all_stop(
    found: Iterable[Sequence[int]], num_rows: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """The tokens of each row, a step after the other, until every row has had a stop token."""
    replies: list[list[int]] = [[] for _ in range(num_rows)]
    ended: set[int] = set()
    for tokens in found:
        for row, token in enumerate(tokens):
            replies[row].append(token)
            if token in stop_ids:
                ended.add(row)
        if len(ended) == num_rows:
            break
    return replies


def before_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    return list(takewhile(lambda token: token not in stop_ids, tokens))
