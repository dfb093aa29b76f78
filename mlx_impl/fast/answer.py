"""`generate.generate` in less time: a cache with room, long prompts in parts, the next token computed ahead.

The next token is queued while this one is read, except where that costs more than it saves. A token that is
drawn at random is not: a draw that no answer needs would change the later ones. Nor is one with a large
cache: MLX copies a cache that it writes into while an earlier step still uses it. For a GPU the graph of the
next token is then built ahead, and queued later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx

from ..generate import most_likely
from ..model import CausalLM, in_evaluation
from . import ops
from .kv_cache import KVCache
from .one_token import OneToken
from .reading import Gap, read_prompt

MAX_AHEAD = 1024  # tokens in the cache of a CPU
# Of the cache of a GPU; an estimate, not measured: to copy more takes longer than to wait.
MAX_BYTES_AHEAD = 2**29

Chosen = tuple[mx.array, mx.array]  # the next token of each row, and its `zero_if_finite`


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    max_tokens: int,
    stop_ids: Collection[int],
    choose: Callable[[mx.array], mx.array] = most_likely,
) -> Iterator[int]:
    """The same tokens and errors, but an update may show one token later."""
    require_tokens(prompt)
    caches = [KVCache() for _ in model.model.layers]
    with in_evaluation(model):
        for (token,) in steps(model, caches, mx.array([list(prompt)]), max_tokens, choose=choose):
            if token in stop_ids:
                return
            yield token


def require_tokens(prompt: Sequence[int]) -> None:
    if not prompt:
        raise ValueError("the prompt must have at least one token, got none")


def steps(
    model: CausalLM,
    caches: Sequence[KVCache],
    tokens_BT: mx.array,
    max_tokens: int,
    gap: Gap | None = None,
    choose: Callable[[mx.array], mx.array] = most_likely,
) -> Iterator[list[int]]:
    """`max_tokens` times the next token of each row; ValueError for logits that are not finite."""

    def after(token_B: mx.array) -> Chosen:
        return chosen(one.logits_BV(token_B, caches, gap), choose)

    if max_tokens > 0:
        now = queued(chosen(model.head(read_prompt(model, tokens_BT, caches, gap)), choose))
        one = OneToken(model, len(tokens_BT))
    for left in range(max_tokens - 1, -1, -1):
        is_ahead, is_greedy = fits_ahead(caches, len(tokens_BT)), choose is most_likely
        following = after(now[0]) if left and is_greedy and (is_ahead or ops.on_gpu()) else None
        yield read_and_queue(now, following, is_ahead)
        if model.training:  # an update was made since
            model.eval()
        if left and not one.is_current():
            one = OneToken(model, len(tokens_BT))
        if left:
            now = following or queued(after(now[0]))


def read_and_queue(now: Chosen, following: Chosen | None, is_ahead: bool) -> list[int]:
    """The tokens of now, read once the following ones are queued if `is_ahead`, else before."""
    if following and is_ahead:
        queued(following)
    tokens = finite_tokens(*now)
    if following and not is_ahead:
        queued(following)
    return tokens


def fits_ahead(caches: Sequence[KVCache], rows: int) -> bool:
    """Whether a token is queued while the one before is under way."""
    if not ops.on_gpu():
        return rows * caches[0].num_tokens <= MAX_AHEAD
    return sum(cache.nbytes for cache in caches) <= MAX_BYTES_AHEAD


def chosen(logits_BV: mx.array, choose: Callable[[mx.array], mx.array]) -> Chosen:
    return choose(logits_BV), zero_if_finite(logits_BV)


def queued(found: Chosen) -> Chosen:
    """The same, on its way."""
    mx.async_eval(*found)  # type: ignore[no-untyped-call]
    return found


def zero_if_finite(logits_BV: mx.array) -> mx.array:
    """0 for each row, or NaN: infinity and NaN times 0 are NaN. `mx.isfinite` would be six steps."""
    return (logits_BV * 0).sum(axis=-1)


def finite_tokens(next_B: mx.array, zero_B: mx.array) -> list[int]:
    tokens: list[int] = next_B.tolist()
    if any(zero_B.tolist()):  # NaN is true
        raise ValueError("logits must be finite, got infinity or NaN")
    return tokens
