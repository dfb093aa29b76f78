"""Greedy decoding of many prompts together, their shared prefix read once.

Prompts of unequal length need no padding and no mask: at each step a row reads its own next token, first of
its prompt, then of its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import takewhile

import mlx.core as mx

from ..generate import KeyValueCache, next_tokens
from ..model import CausalLM, in_evaluation
from .packed_modules import unpacking_first

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
    """The greedy answer to every prompt, in the order of the prompts.

    `watched(groups, how many)` passes on the groups of prompts that are decoded together, to show progress;
    `watched_steps(lengths)` the lengths of text that a group grows to, a token each.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with in_evaluation(model), unpacking_first(model):
        prefix = read_prefix(model, prompts) if prompts else []
        starts = range(0, len(by_length), MAX_ROWS)
        for start in watched(starts, len(starts)):
            rows = by_length[start : start + MAX_ROWS]
            caches = [repeated(cache, len(rows)) for cache in prefix]
            together = [prompts[row] for row in rows]
            replies = decode_batch(model, caches, together, max_tokens, stop_ids, watched_steps)
            for row, reply in zip(rows, replies, strict=True):
                answers[row] = reply
    return answers


def read_prefix(model: CausalLM, prompts: Prompts) -> list[KeyValueCache]:
    """Caches of one row with the prefix that all prompts share; at least one token of each is left."""
    shortest = min(len(prompt) for prompt in prompts)
    columns = zip(*(prompt[: shortest - 1] for prompt in prompts), strict=True)
    num_shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    caches = [KeyValueCache() for _ in model.model.layers]
    if num_shared:
        mx.eval(model.model(mx.array([list(prompts[0][:num_shared])]), caches=caches))
    return caches


def repeated(cache: KeyValueCache, rows: int) -> KeyValueCache:
    """The cache of one row for each of `rows` rows."""
    copy = KeyValueCache()
    if cache.keys_BGSK is not None and cache.values_BGSK is not None:
        shape = (rows, *cache.keys_BGSK.shape[1:])
        copy.keys_BGSK = mx.broadcast_to(cache.keys_BGSK, shape)
        copy.values_BGSK = mx.broadcast_to(cache.values_BGSK, shape)
    return copy


def decode_batch(
    model: CausalLM,
    caches: list[KeyValueCache],
    prompts: Prompts,
    max_tokens: int,
    stop_ids: Collection[int],
    watched_steps: Callable[[range], Iterable[int]] = lambda lengths: lengths,
) -> list[list[int]]:
    """The greedy answers; the caches hold what has been read of every prompt."""
    texts = [list(prompt) for prompt in prompts]
    limits = [len(prompt) + max_tokens for prompt in prompts]
    shortest = min(map(len, prompts))
    replies: list[list[int]] = [[] for _ in prompts]
    tokens_BT = mx.array([text[caches[0].num_tokens : shortest] for text in texts])
    for length in watched_steps(range(shortest, max(limits))):
        for text, token in zip(texts, next_tokens(model, tokens_BT, caches).tolist(), strict=True):
            if len(text) == length:  # its prompt has been read, so this token is its answer's
                text.append(token)
        replies = [text[limit - max_tokens : limit] for text, limit in zip(texts, limits, strict=True)]
        if all(len(reply) == max_tokens or any(token in stop_ids for token in reply) for reply in replies):
            break
        tokens_BT = mx.array([[text[length]] for text in texts])
    return [before_stop(reply, stop_ids) for reply in replies]


def before_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    return list(takewhile(lambda token: token not in stop_ids, tokens))
