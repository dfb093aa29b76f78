"""`generate.generate` in less time: a cache in blocks, long prompts in parts, a device that does not wait.

The next token is under way while this one is read. Tokens that are drawn are not: a draw that no answer needs
would change the ones after it. Nor are those of a large cache on a CPU, which MLX copies while a step still
uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx

from ..generate import most_likely
from ..model import CausalLM, in_evaluation
from . import ops
from .key_blocks import BlockCache
from .reading import Gap, read, read_prompt

MAX_AHEAD = 1024  # tokens in the cache of a CPU
REFUSED = -1  # in place of the next token of a row whose logits are not finite


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    max_tokens: int,
    stop_ids: Collection[int],
    choose: Callable[[mx.array], mx.array] = most_likely,
) -> Iterator[int]:
    """The same tokens and errors, but an update may show one token later."""
    require_tokens(prompt)
    caches = [BlockCache() for _ in model.model.layers]
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
    caches: Sequence[BlockCache],
    tokens_BT: mx.array,
    max_tokens: int,
    gap: Gap | None = None,
    choose: Callable[[mx.array], mx.array] = most_likely,
) -> Iterator[list[int]]:
    """`max_tokens` times the next token of each row; ValueError for logits that are not finite."""

    def after(x_BD: mx.array) -> mx.array:
        next_B = finite_or_refused(model.head(x_BD), choose)
        mx.async_eval(next_B)  # type: ignore[no-untyped-call]
        return next_B

    def is_ahead() -> bool:
        is_small = len(tokens_BT) * caches[0].num_tokens <= MAX_AHEAD
        return choose is most_likely and (is_small or ops.on_gpu())

    next_B = after(read_prompt(model, tokens_BT, caches, gap)) if max_tokens > 0 else None
    for left in range(max_tokens - 1, -1, -1):
        assert next_B is not None
        following_B = after(read(model, next_B[:, None], caches, gap)) if left and is_ahead() else None
        tokens = next_B.tolist()
        if REFUSED in tokens:
            raise ValueError("logits must be finite, got infinity or NaN")
        yield tokens
        if model.training:  # an update was made since
            model.eval()
        if left and following_B is None:
            following_B = after(read(model, next_B[:, None], caches, gap))
        next_B = following_B


def finite_or_refused(logits_BV: mx.array, choose: Callable[[mx.array], mx.array]) -> mx.array:
    """The next token of each row, chosen by `choose`; REFUSED where its logits are not finite."""
    return mx.where(mx.isfinite(logits_BV).all(axis=-1), choose(logits_BV).astype(mx.int32), REFUSED)
