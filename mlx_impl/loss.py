"""Masked next-token cross-entropy, as a sum and a count, so that a mean can be formed once, over everything.

The mask says of every position whether its target counts; no length is compared with a position, so a padding
target cannot slip in. Differs from reference/loss.py: the log-sum-exp is written out; the logits may be those
of the target positions alone.
"""

from __future__ import annotations

import mlx.core as mx

from . import ops


def next_token_nats(logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple[mx.array, mx.array]:
    """-sum log softmax(logits)[target] over the positions of the mask, in nats, and their number."""
    chosen_N = mx.take_along_axis(logits_NV, targets_N[:, None], axis=-1).squeeze(-1)
    nats_N = ops.logsumexp(logits_NV) - chosen_N
    return mx.where(mask_N, nats_N, 0).sum(), mask_N.sum()
