"""Masked next-token cross-entropy, as a sum and a count, so that an update's mean is formed once.

The mask marks the positions whose next token is a target. It comes from `data.make_batch`, which marks each
token; it is not computed from row lengths, so an off-by-one cannot make padding a target.
Differs from reference/loss.py: MLX's `cross_entropy` rests on a log-sum-exp that is inaccurate at a large
vocabulary, so the loss is composed of our own, in float32 or better; the mask chooses by `where`, because MLX
has no indexing by a mask.
"""

from __future__ import annotations

import mlx.core as mx

from . import ops


def next_token_nats(
    logits_BTV: mx.array, targets_BT: mx.array, mask_BT: mx.array
) -> tuple[mx.array, mx.array]:
    """-sum log softmax(logits)[target] over the positions of the mask, in nats, and their number."""
    logits_NV, targets_N = ops.widened(logits_BTV.flatten(0, 1)), targets_BT.flatten()
    target_logits_N = mx.take_along_axis(logits_NV, targets_N[:, None], axis=-1).squeeze(-1)
    nats_N = ops.logsumexp(logits_NV) - target_logits_N
    return mx.where(mask_BT.flatten(), nats_N, 0).sum(), mask_BT.sum()
