"""Decoding one answer with a key/value cache.

Differs from reference/generate.py: the cache, without which every step reads the whole text again; `mx.eval`,
without which the graph would grow with every token; `choose` takes several rows, which `fast/answer.py` has;
an empty prompt is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx

from .model import CausalLM, in_evaluation


class KeyValueCache:
    """The keys and values of one attention layer for the tokens read so far."""

    def __init__(self) -> None:
        self.keys_BGSK: mx.array | None = None
        self.values_BGSK: mx.array | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self.keys_BGSK is None else self.keys_BGSK.shape[2]

    def extend(self, k_BGTK: mx.array, v_BGTK: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values, the new ones last."""
        if self.keys_BGSK is None or self.values_BGSK is None:
            keys_BGSK, values_BGSK = k_BGTK, v_BGTK
        else:
            keys_BGSK = mx.concatenate([self.keys_BGSK, k_BGTK], axis=2)
            values_BGSK = mx.concatenate([self.values_BGSK, v_BGTK], axis=2)
        self.keys_BGSK, self.values_BGSK = keys_BGSK, values_BGSK
        return keys_BGSK, values_BGSK


def most_likely(logits_BV: mx.array) -> mx.array:
    """Greedy decoding."""
    return mx.argmax(logits_BV, axis=-1)


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    max_tokens: int,
    stop_ids: Collection[int],
    choose: Callable[[mx.array], mx.array] = most_likely,
) -> Iterator[int]:
    """The answer's tokens as they come; a stop token ends it and is not yielded.

    Until the iterator has ended, or is closed, the model is in evaluation; an update in between is not.

    `choose` maps logits_BV to the next token of each row. Raises ValueError for an empty prompt, and for
    logits that are not finite: the argmax of NaN is some token, often 0.
    """
    if not prompt:
        raise ValueError("the prompt must have at least one token, got none")
    caches, tokens_BT = [KeyValueCache() for _ in model.model.layers], mx.array([list(prompt)])
    with in_evaluation(model):
        for _ in range(max_tokens):
            if model.training:  # an update was made since the last token
                model.eval()
            next_B = next_tokens(model, tokens_BT, caches, choose)
            token = int(next_B.item())
            if token in stop_ids:
                return
            yield token
            tokens_BT = next_B[:, None]


def next_tokens(
    model: CausalLM,
    tokens_BT: mx.array,
    caches: Sequence[KeyValueCache],
    choose: Callable[[mx.array], mx.array] = most_likely,
) -> mx.array:
    """The next token of each row, after these tokens have been read into the caches."""
    x_BTD = model.model(tokens_BT, caches=caches)
    logits_BV = model.head(x_BTD[:, -1])
    next_B, are_finite = choose(logits_BV), mx.isfinite(logits_BV).all()
    mx.eval(next_B, are_finite)
    if not are_finite:
        raise ValueError("logits must be finite, got infinity or NaN")
    return next_B
