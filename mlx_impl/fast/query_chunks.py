"""Causal attention of long rows on a CPU, one chunk of queries after another: memory grows with T, not T^2.

The scores of a chunk are computed, used and dropped; the backward pass computes them again.
Source: Dao et al. 2022, "FlashAttention", section 3.1 (recomputation); of it only the order is used here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx

from . import cpu_ops

MAX_SCORES = 2**26  # at once: 256 MiB in float32


def are_needed(scores: int) -> bool:
    """Whether so many scores are not kept."""
    return scores > MAX_SCORES


def attention(q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array) -> mx.array:
    """`ops.attention` without a mask; differentiable."""
    B, H, T, _ = q_BHTK.shape
    size = max(1, MAX_SCORES // (B * H * T))
    chunks = [slice(start, min(start + size, T)) for start in range(0, T, size)]
    forward: Any = mx.custom_function(partial(mixed, chunks))
    forward.vjp(partial(mixed_gradient, chunks))
    mix_BHTK: mx.array = forward(q_BHTK, k_BGTK, v_BGTK)
    return mix_BHTK


def mixed(chunks: list[slice], q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array) -> mx.array:
    """The mix of values of all queries; each chunk waits for the one before."""
    mixes: list[mx.array] = []
    for chunk in chunks:
        (q_BHCK,) = mx.depends([q_BHTK[:, :, chunk]], mixes[-1:] or [k_BGTK])
        seen = slice(chunk.stop)
        mixes.append(attend(chunk, q_BHCK, k_BGTK[:, :, seen], v_BGTK[:, :, seen]))
    return mx.concatenate(mixes, axis=2)


def mixed_gradient(chunks: list[slice], primals: tuple, d_BHTK: mx.array, _: mx.array) -> list[mx.array]:
    """dq, dk and dv, the last two summed over the chunks; each chunk waits for the one before."""
    q_BHTK, k_BGTK, v_BGTK = primals
    dk_BGTK, dv_BGTK = mx.zeros_like(k_BGTK), mx.zeros_like(v_BGTK)
    dqs: list[mx.array] = []
    for chunk in chunks:
        seen = slice(chunk.stop)
        arrays = [q_BHTK[:, :, chunk], k_BGTK[:, :, seen], v_BGTK[:, :, seen], d_BHTK[:, :, chunk]]
        arrays = mx.depends(arrays, [dk_BGTK, dv_BGTK, *dqs[-1:]])
        gradients = mx.vjp(partial(attend, chunk), arrays[:3], arrays[3:])[1]
        dqs.append(gradients[0])
        dk_BGTK = dk_BGTK.at[:, :, seen].add(gradients[1])
        dv_BGTK = dv_BGTK.at[:, :, seen].add(gradients[2])
    return [mx.concatenate(dqs, axis=2), dk_BGTK, dv_BGTK]


def attend(chunk: slice, q_BHCK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array) -> mx.array:
    """The queries of this chunk; of the keys those up to its end are given."""
    is_seen_CS = mx.arange(chunk.stop) <= mx.arange(chunk.start, chunk.stop)[:, None]
    return cpu_ops.attention(q_BHCK, k_BGSK, v_BGSK, is_seen_CS)
