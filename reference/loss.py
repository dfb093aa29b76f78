"""Masked next-token cross-entropy, as a sum and a count, so that an update's mean is formed once.

Differs from mlx_impl/loss.py: torch's own `cross_entropy`; the mask chooses by indexing.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy


def next_token_nats(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """-sum log softmax(logits)[target] over the positions of the mask, in nats, and their number."""
    nats_BT = cross_entropy(logits_BTV.swapaxes(1, 2), targets_BT, reduction="none")
    return nats_BT[mask_BT].sum(), mask_BT.sum()
