"""The decoder's forward pass for training, over the modules and parameters of `model.py`.

It computes the same hidden states with less work: padding-free outside attention, a prefix that all rows
share once, the last block at target positions only (`unpadding.py`), packed examples as rows of attention
(`segments.py`), linears of one input together (`projection.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..data import Batch
from ..model import Attention, Block, CausalLM, Decoder, RMSNorm
from ..train import Arrays, Loss, Nats
from . import ops
from .head import head_nats, head_of
from .kept_positions import kept_of, target_positions
from .layout import Layout, masks_of
from .projection import project, project_gated
from .recompute import recomputed
from .segments import SubBatch, examples_apart
from .unpadding import Unpadding
from .vectors import Vectors, as_vectors


def to_arrays(batch: Batch) -> Arrays:
    """inputs_BT; positions_N, targets_N and mask_N of the targets; the sub-batches; the kept positions.

    positions_N is None where every position has a target. Packed examples are rows of their own; of several
    sub-batches (`segments.py`) the batch is one row.
    """
    sub_batches: list[SubBatch] = []
    if batch.segment_BT is not None:
        batch, sub_batches = examples_apart(batch)
    several = sub_batches if len(sub_batches) > 1 else []
    kept = kept_of(batch, sub_batches)
    kept_arrays = [mx.array(array) for array in kept or () if array is not None]
    positions_N, targets_N, mask_N = target_positions(batch)
    is_everywhere = batch.mask_BT.all() and mask_N.all() and not kept_arrays
    positions = None if is_everywhere else mx.array(positions_N)
    return [mx.array(batch.inputs_BT), positions, mx.array(targets_N), mx.array(mask_N), several, kept_arrays]


def batch_loss(model: CausalLM, arrays: Arrays) -> Nats:
    """The sum of nats over the targets, and their number, as `train.batch_loss`."""
    inputs_BT, positions_N, targets_N, mask_N, sub_batches, kept = arrays
    x_ND = hidden_at_targets(model.model, inputs_BT, positions_N, sub_batches, kept)
    return head_nats(head_of(model, after=x_ND), model.config.vocab_size, x_ND, targets_N, mask_N)


def flatten_grads(grads: Any) -> Vectors:
    """The gradients of all A as one vector, of all B as another, as `VectorOptimizer` takes them."""
    return as_vectors(grads)


FAST = Loss(to_arrays, batch_loss, flatten_grads)


def hidden_at_targets(
    decoder: Decoder,
    tokens_BT: mx.array,
    positions_N: mx.array | None,
    sub_batches: Sequence[SubBatch] = (),
    kept: Sequence[mx.array] = (),
) -> mx.array:
    """(N, D): the final hidden states at these positions of the flattened (B, T), or at all of them.

    `kept` are the fields of `kept_positions.KeptPositions`; without them every position is computed.
    `sub_batches` are those of a batch that is one row (`segments.py`).
    """
    unpadding = Unpadding(*kept) if kept else None
    layout = Layout(masks_of(tokens_BT.shape[1], sub_batches, decoder.window), unpadding, sub_batches)
    if unpadding:
        tokens_BT = tokens_BT.flatten()[unpadding.kept_U][None]
    x_BTD = decoder.embed_tokens(tokens_BT)
    for layer in decoder.layers[:-1]:
        x_BTD = forward_block(decoder, layer, x_BTD, layout)
    x_BTD = forward_block(decoder, decoder.layers[-1], x_BTD, replace(layout, targets_N=positions_N))
    return decoder.norm(x_BTD).flatten(0, 1)  # (1, N, D) of the selected, a view where [0] copies


def forward_block(decoder: Decoder, layer: Block, x_BTD: mx.array, layout: Layout) -> mx.array:
    if is_recomputed(decoder, layer):
        return recomputed(layer, lambda x_BTD: block(layer, x_BTD, layout), x_BTD)
    return block(layer, x_BTD, layout)


def is_recomputed(decoder: Decoder, layer: Block) -> bool:
    """On a GPU not the last block: its gradient comes first, so it would be computed twice in a row.

    What it keeps is then in memory beside the logits. There a CPU holds most, so it recomputes all blocks.
    """
    is_kept = ops.on_gpu() and layer is decoder.layers[-1]
    return decoder.grad_checkpoint and decoder.training and not is_kept


def block(layer: Block, x_BTD: mx.array, layout: Layout) -> mx.array:
    """`Block.__call__`."""
    mix_BTD = attention(layer.self_attn, layer.input_layernorm(x_BTD), layout)
    x_BTD = layout.select_targets(x_BTD) + mix_BTD
    mlp = layer.mlp
    gate_BTF, up_BTF = project(layer.post_attention_layernorm(x_BTD), mlp.gate_proj, mlp.up_proj)
    return x_BTD + project_gated(gate_BTF, up_BTF, mlp.down_proj)


def attention(layer: Attention, x_BTD: mx.array, layout: Layout) -> mx.array:
    """`Attention.__call__`."""
    q_BTO, k_BTO, v_BTO = project(x_BTD, layer.q_proj, layer.k_proj, layer.v_proj)
    if layer.qk_norm:  # before padding is there again
        q_BTO, k_BTO = by_heads(layer.q_norm, q_BTO), by_heads(layer.k_norm, k_BTO)
    q_BHTK, k_BGTK, v_BGTK = (
        layout.split_heads(y_BTO, y_BTO.shape[-1] // layer.head_dim) for y_BTO in (q_BTO, k_BTO, v_BTO)
    )
    mix_BTO = layout.merge_heads(layout.attend(q_BHTK, k_BGTK, v_BGTK, layer.frequency_P))
    return project(layout.select_targets(mix_BTO), layer.o_proj)[0]


def by_heads(norm: RMSNorm, x_BTO: mx.array) -> mx.array:
    """The norm of each head."""
    return norm(mx.unflatten(x_BTO, -1, (-1, norm.weight.size))).flatten(-2)
