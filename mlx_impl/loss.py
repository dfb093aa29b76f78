"""Masked next-token cross-entropy, as a sum and a count, so that a mean can be formed once, over everything.

The mask says of every position whether its target counts; no length is compared with a position, so a padding
target cannot slip in. Differs from reference/loss.py: the log-sum-exp is a primitive; and training takes the
loss of head and cross-entropy as one, so that the logits of all positions never stand in memory together.
Source: Hsu et al. 2024, "Liger Kernel", section 3.2 (FusedLinearCrossEntropy): a frozen head's gradient goes
to its input alone, and can be formed from a chunk's softmax while that is at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from . import ops

CHUNK_LOGITS = 2**25  # of so many logits at most the softmax is in memory at once: 128 MiB in float32

Head = Callable[[mx.array], mx.array]  # hidden states to logits


def next_token_nats(logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple[mx.array, mx.array]:
    """-sum log softmax(logits)[target] over the positions of the mask, in nats, and their number."""
    chosen_N = mx.take_along_axis(logits_NV, targets_N[:, None], axis=-1).squeeze(-1)
    nats_N = ops.logsumexp(logits_NV) - chosen_N
    return mx.where(mask_N, nats_N, 0).sum(), mask_N.sum()


def head_nats(
    head: Head, vocab_size: int, x_ND: mx.array, targets_N: mx.array, mask_N: mx.array
) -> tuple[mx.array, mx.array]:
    """next_token_nats(head(x_ND), ...) of a frozen head, CHUNK_LOGITS at a time; differentiable by x_ND.

    d nats / d x = (softmax(logits) - onehot(target)) W, formed in the forward pass, where the mask is.
    """

    @mx.custom_function  # type: ignore[untyped-decorator]
    def nats_and_gradient(x_ND: mx.array) -> tuple[mx.array, mx.array]:
        chunk = max(1, CHUNK_LOGITS // vocab_size)
        nats, gradients = mx.array(0.0, ops.widened(x_ND).dtype), []  # type: mx.array, list[mx.array]
        for start in range(0, len(x_ND), chunk):
            here = slice(start, start + chunk)
            x_CD = mx.depends([x_ND[here]], [nats, *gradients[-1:]])[0]  # one chunk after the other
            part, gradient_CD = chunk_nats(head, x_CD, targets_N[here], mask_N[here])
            nats = nats + part
            gradients.append(gradient_CD)
        return nats, mx.concatenate(gradients)

    @nats_and_gradient.vjp  # type: ignore[untyped-decorator]
    def gradient(_: mx.array, cotangents: tuple, outputs: tuple) -> mx.array:
        return cotangents[0].astype(outputs[1].dtype) * outputs[1]

    return nats_and_gradient(x_ND)[0], mask_N.sum()


def chunk_nats(
    head: Head, x_CD: mx.array, targets_C: mx.array, mask_C: mx.array
) -> tuple[mx.array, mx.array]:
    """The sum of nats, and its gradient by x_CD."""
    nats_C, d_logits_CV = ops.cross_entropy(ops.widened(head(x_CD)), targets_C, mask_C)
    _, (gradient_CD,) = mx.vjp(head, [x_CD], [d_logits_CV.astype(x_CD.dtype)])  # no second product with it
    return nats_C.sum(), gradient_CD
