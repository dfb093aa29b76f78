"""Greedy decoding without a cache: the whole text again for every token.

Differs from mlx_impl/generate.py: no key/value cache, no sampling; one text at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
    """The next `num_tokens` most likely tokens, and the logits that chose each (num_tokens, V)."""
    model.eval()
    tokens, rows = list(prompt), []
    for _ in range(num_tokens):
        logits_V = model(torch.tensor([tokens]))[0, -1]
        rows.append(logits_V)
        tokens.append(int(logits_V.argmax()))
    return tokens[len(prompt) :], torch.stack(rows)
