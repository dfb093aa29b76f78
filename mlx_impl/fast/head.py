"""Chunked cross-entropy: head and loss as one function, so that all logits are never in memory together.

Source: Hsu et al. 2024, "Liger Kernel", section 3.2 (FusedLinearCrossEntropy): the head is frozen, so the
gradient goes to its input alone, and each chunk's part of it can be formed while its softmax is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..model import CausalLM
from . import ops
from .packed import is_unpacked_for, packed_of, product_in_parts

CHUNK_LOGITS = 2**25  # logits in memory at once: 128 MiB in float32
PACKED_ROWS = 1024  # of a packed weight on a CPU: measured, for SmolLM2 as fast as 512, 2,048 take 8% longer

Head = Callable[[mx.array], mx.array]  # hidden states to logits


@dataclass(frozen=True)
class EvaluationHead:
    """A head in an evaluation, for which `head_nats` forms no gradient."""

    head: Head

    def __call__(self, x_ND: mx.array) -> mx.array:
        return self.head(x_ND)


def head_module(model: CausalLM) -> nn.Module:
    """The module that holds the head's weight."""
    return model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head


def head_of(model: CausalLM, after: mx.array) -> Head:
    """`model.head`; a packed weight is unpacked for it once `after` has been computed."""
    head = unpacking_head(model, after)
    return head if model.training else EvaluationHead(head)


def unpacking_head(model: CausalLM, after: mx.array) -> Head:
    """On a GPU the weight is unpacked once for all calls; on a CPU in parts: large arrays are slow there."""
    packed = packed_of(head_module(model))
    if packed is None or not is_unpacked_for(len(after)):
        return model.head
    if not ops.on_gpu():
        return partial(product_in_parts, packed=packed, rows=PACKED_ROWS)
    weight_VD = packed.unpacked_OI(mx.stop_gradient(after))
    return lambda x_ND: x_ND @ weight_VD.T


def head_nats(
    head: Head, vocab_size: int, x_ND: mx.array, targets_N: mx.array, mask_N: mx.array
) -> tuple[mx.array, mx.array]:
    """`loss.next_token_nats` of head(x_ND), CHUNK_LOGITS logits at a time; differentiable by x_ND.

    d nats / d x = (softmax(logits) - onehot(target)) W, formed in the forward pass, except in an evaluation.
    """
    forms_gradient = not isinstance(head, EvaluationHead)

    def nats_and_gradient(x_ND: mx.array) -> tuple[mx.array, mx.array]:
        chunk = max(1, CHUNK_LOGITS // vocab_size)
        nats, gradients = mx.array(0.0, ops.widened(x_ND).dtype), []  # type: mx.array, list[mx.array]
        for start in range(0, len(x_ND), chunk):
            part = slice(start, start + chunk)
            before = [nats, *gradients[-1:]] if forms_gradient else [nats]
            (x_CD,) = mx.depends([x_ND[part]], before)  # one chunk after the other
            part_nats, gradient_CD = chunk_nats(head, x_CD, targets_N[part], mask_N[part])
            nats = nats + part_nats
            gradients.append(gradient_CD)
        return nats, mx.concatenate(gradients)

    if not forms_gradient:
        return nats_and_gradient(x_ND)[0], mask_N.sum()
    with_gradient = mx.custom_function(nats_and_gradient)

    @with_gradient.vjp
    def gradient(_: mx.array, cotangents: tuple, outputs: tuple) -> mx.array:
        return ops.scaled(cotangents[0].astype(outputs[1].dtype), outputs[1])

    return with_gradient(x_ND)[0], mask_N.sum()


def chunk_nats(
    head: Head, x_CD: mx.array, targets_C: mx.array, mask_C: mx.array
) -> tuple[mx.array, mx.array]:
    """The sum of nats, and its gradient by x_CD."""
    nats_C, d_logits_CV = ops.cross_entropy(head(x_CD), targets_C, mask_C)
    _, (gradient_CD,) = mx.vjp(head, [x_CD], [d_logits_CV.astype(x_CD.dtype)])
    return nats_C.sum(), gradient_CD
