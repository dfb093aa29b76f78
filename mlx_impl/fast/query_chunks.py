"""Causal attention of long rows on a CPU, one chunk of queries after another: memory grows with T, not T^2.

The scores of a chunk are computed, used and dropped; the backward pass computes them again.
Source: Dao et al. 2022, "FlashAttention", section 3.1 (recomputation); of it only the order is used here.
"""

from __future__ import annotations

from functools import partial

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
    parts = [slice(start, min(start + size, T)) for start in range(0, T, size)]

    @mx.custom_function
    def forward(q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array) -> mx.array:
        mixes: list[mx.array] = []
        for part in parts:
            (q_BHCK,) = mx.depends([q_BHTK[:, :, part]], mixes[-1:] or [k_BGTK])
            seen = slice(part.stop)
            mixes.append(attend(part, q_BHCK, k_BGTK[:, :, seen], v_BGTK[:, :, seen]))
        return mx.concatenate(mixes, axis=2)

    @forward.vjp
    def backward(primals: tuple, d_BHTK: mx.array, _: mx.array) -> list[mx.array]:
        q_BHTK, k_BGTK, v_BGTK = primals
        dk_BGTK, dv_BGTK = mx.zeros_like(k_BGTK), mx.zeros_like(v_BGTK)
        dqs: list[mx.array] = []
        for part in parts:
            seen = slice(part.stop)
            arrays = [q_BHTK[:, :, part], k_BGTK[:, :, seen], v_BGTK[:, :, seen], d_BHTK[:, :, part]]
            arrays = mx.depends(arrays, [dk_BGTK, dv_BGTK, *dqs[-1:]])
            gradients = mx.vjp(partial(attend, part), arrays[:3], arrays[3:])[1]
            dqs.append(gradients[0])
            dk_BGTK = dk_BGTK.at[:, :, seen].add(gradients[1])
            dv_BGTK = dv_BGTK.at[:, :, seen].add(gradients[2])
        return [mx.concatenate(dqs, axis=2), dk_BGTK, dv_BGTK]

    return forward(q_BHTK, k_BGTK, v_BGTK)


def attend(part: slice, q_BHCK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array) -> mx.array:
    """The queries of this part; of the keys those up to its end are given."""
    is_seen_CS = mx.arange(part.stop) <= mx.arange(part.start, part.stop)[:, None]
    return cpu_ops.attention(q_BHCK, k_BGSK, v_BGSK, is_seen_CS)
