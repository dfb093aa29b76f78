"""Masked next-token cross-entropy, as a sum and a count, so that a mean can be formed once, over everything.

The mask says of every position whether its target counts; no length is compared with a position, so a padding
target cannot slip in. Differs from reference/loss.py: the log-sum-exp is written out.
"""

from __future__ import annotations

import mlx.core as mx

from . import ops


def next_token_nats(
    logits_BTV: mx.array, targets_BT: mx.array, mask_BT: mx.array
) -> tuple[mx.array, mx.array]:
    """-sum log softmax(logits)[target] over the positions of the mask, in nats, and their number."""
    chosen_BT = mx.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1).squeeze(-1)
    nats_BT = ops.logsumexp(logits_BTV) - chosen_BT
    return mx.where(mask_BT, nats_BT, 0).sum(), mask_BT.sum()
