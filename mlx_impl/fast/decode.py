"""Greedy decoding of many prompts together, their shared prefix read once.

Prompts of unequal length end together: a shorter one has a gap before it, which nothing attends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import takewhile

import mlx.core as mx

from ..model import CausalLM, in_evaluation
from .answer import require_tokens, steps
from .key_blocks import BlockCache
from .packed_modules import unpacking_first
from .reading import Gap, read_prompt

MAX_ROWS = 64  # prompts decoded together

Prompts = Sequence[Sequence[int]]


def generate_all(
    model: CausalLM,
    prompts: Prompts,
    max_tokens: int,
    stop_ids: Collection[int],
    watched: Callable[[range, int], Iterable[int]] = lambda groups, count: groups,
    watched_steps: Callable[[range], Iterable[int]] = lambda lengths: lengths,
) -> list[list[int]]:
    """The greedy answer to every prompt, in the order of the prompts; ValueError for an empty one.

    `watched(groups, how many)` passes on the groups of prompts that are decoded together, to show progress;
    `watched_steps(lengths)` the lengths of text that a group grows to, a token each.
    """
    for prompt in prompts:
        require_tokens(prompt)
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with in_evaluation(model), unpacking_first(model):
        prefix = read_prefix(model, prompts) if prompts else []
        starts = range(0, len(by_length), MAX_ROWS)
        for start in watched(starts, len(starts)):
            rows = by_length[start : start + MAX_ROWS]
            caches = [cache.for_rows(len(rows)) for cache in prefix]
            together = [prompts[row] for row in rows]
            replies = decode_batch(model, caches, together, max_tokens, stop_ids, watched_steps)
            for row, reply in zip(rows, replies, strict=True):
                answers[row] = reply
    return answers


def read_prefix(model: CausalLM, prompts: Prompts) -> list[BlockCache]:
    """Caches of one row with the prefix that all prompts share; at least one token of each is left."""
    shortest = min(len(prompt) for prompt in prompts)
    columns = zip(*(prompt[: shortest - 1] for prompt in prompts), strict=True)
    num_shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    caches = [BlockCache() for _ in model.model.layers]
    if num_shared:
        mx.eval(read_prompt(model, mx.array([list(prompts[0][:num_shared])]), caches))
    return caches


def decode_batch(
    model: CausalLM,
    caches: list[BlockCache],
    prompts: Prompts,
    max_tokens: int,
    stop_ids: Collection[int],
    watched_steps: Callable[[range], Iterable[int]] = lambda lengths: lengths,
) -> list[list[int]]:
    """The greedy answers; the caches hold what has been read of every prompt."""
    longest, num_read = max(map(len, prompts)), caches[0].num_tokens
    gaps = [longest - len(prompt) for prompt in prompts]
    gap = Gap(num_read, mx.array(gaps)) if any(gaps) else None
    # A gap holds tokens of its own row: should they give NaN, only that row has it.
    rows = [
        [prompt[num_read]] * num + list(prompt[num_read:]) for prompt, num in zip(prompts, gaps, strict=True)
    ]
    replies: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    found = steps(model, caches, mx.array(rows), max_tokens, gap)
    for _, tokens in zip(watched_steps(range(longest, longest + max_tokens)), found, strict=False):
        for row, token in enumerate(tokens):
            replies[row].append(token)
            if token in stop_ids:
                ended.add(row)
        if len(ended) == len(prompts):
            break
    return [before_stop(reply, stop_ids) for reply in replies]


def before_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    return list(takewhile(lambda token: token not in stop_ids, tokens))
