"""Choosing the next token from its logits: the most likely, or a draw.

Source: nucleus sampling, Holtzman et al. 2020, section 3.1; the temperature first, as in transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; at temperature 0 it is the most likely."""

    temperature: float = 0.0
    top_p: float = 1.0  # draw from the smallest set of tokens whose probability reaches it

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


GREEDY = Sampling()


def next_tokens(logits_BV: mx.array, sampling: Sampling) -> mx.array:
    """argmax at temperature 0, else a draw from softmax(logits / temperature), cut to its nucleus.

    In float32: a running sum of small probabilities stands still in bfloat16, and the nucleus is everything.
    """
    if sampling.temperature == 0:
        return mx.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV.astype(mx.float32) / sampling.temperature
    if sampling.top_p < 1:
        logits_BV = cut_to_nucleus(logits_BV, sampling.top_p)
    return mx.random.categorical(logits_BV)


def cut_to_nucleus(logits_BV: mx.array, top_p: float) -> mx.array:
    """-inf for every token before which, from the most likely down, p has already been reached."""
    order_BV = mx.argsort(-logits_BV, axis=-1)
    sorted_BV = mx.take_along_axis(logits_BV, order_BV, axis=-1)
    probability_BV = mx.softmax(sorted_BV, axis=-1, precise=True)
    before_BV = mx.cumsum(probability_BV, axis=-1, inclusive=False)
    kept_BV = mx.where(before_BV < top_p, sorted_BV, -mx.inf)
    return mx.put_along_axis(logits_BV, order_BV, kept_BV, axis=-1)
