"""Sampling the next token: temperature and nucleus, as the `choose` of `generate.generate`.

Source: nucleus sampling (top-p), Holtzman et al. 2020, section 3.1; temperature first, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..generate import most_likely


@dataclass(frozen=True)
class Sampling:
    """Draws from softmax(logits / temperature), cut to its nucleus; greedy at temperature 0."""

    temperature: float = 0.0
    top_p: float = 1.0  # draw from the smallest set of tokens whose probability reaches it

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def choose(self) -> Callable[[mx.array], mx.array]:
        """As `generate` takes it; at temperature 0 `most_likely`, by which it sees that nothing is drawn."""
        return self if self.temperature else most_likely

    def __call__(self, logits_BV: mx.array) -> mx.array:
        """The next token of each row.

        In float32: in bfloat16 a running sum of small probabilities stops growing.
        """
        if self.temperature == 0:
            return most_likely(logits_BV)
        logits_BV = logits_BV.astype(mx.float32) / self.temperature
        if self.top_p < 1:
            logits_BV = cut_to_nucleus(logits_BV, self.top_p)
        return mx.random.categorical(logits_BV)


def cut_to_nucleus(logits_BV: mx.array, top_p: float) -> mx.array:
    """-inf for every token outside the nucleus: those before it, from the most likely down, reach top_p."""
    order_BV = mx.argsort(-logits_BV, axis=-1)
    sorted_BV = mx.take_along_axis(logits_BV, order_BV, axis=-1)
    probability_BV = mx.softmax(sorted_BV, axis=-1, precise=True)
    before_BV = mx.cumsum(probability_BV, axis=-1, inclusive=False)
    nucleus_BV = mx.where(before_BV < top_p, sorted_BV, -mx.inf)
    return mx.put_along_axis(logits_BV, order_BV, nucleus_BV, axis=-1)
