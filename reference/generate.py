"""Decoding one answer.

Differs from mlx_impl/generate.py: without a key/value cache, each token reads the whole text again; one row
only; an empty prompt is not refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from reference.model import in_evaluation


def most_likely(logits_V: Tensor) -> Tensor:
    """Greedy decoding."""
    return logits_V.argmax()


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: list[int],
    max_tokens: int,
    stop_ids: Collection[int],
    choose: Callable[[Tensor], Tensor] = most_likely,
) -> Iterator[int]:
    """The answer's tokens as they come; a stop token ends it and is not yielded.

    Raises ValueError for logits that are not finite: the argmax of NaN is some token, often 0.
    """
    tokens = list(prompt)
    with in_evaluation(model):
        for _ in range(max_tokens):
            logits_V = model(torch.tensor([tokens]))[0, -1]
            if not logits_V.isfinite().all():
                raise ValueError("logits must be finite, got infinity or NaN")
            token = int(choose(logits_V))
            if token in stop_ids:
                return
            yield token
            tokens.append(token)
