"""Attention, gate and cross-entropy for a CPU, with fewer passes over memory than MLX's compositions.

Gradients are written out. Exponentials are powers of e^8, which are faster than `mx.exp` and more exact. Sums
over rows are products with ones, which a BLAS does faster. Attention multiplies all query heads that share a
key/value head at once. Equations as in `ops.py`; sources as in `model.py`.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ..ops import widened

PIECE = 1024  # terms


def exp(x: mx.array, sign: int = 1) -> mx.array:
    """e^x, or e^-x for sign = -1, as a power of e^8; x in float32 or better.

    float32's e has a relative error of 3e-8, which becomes 3e-8 x in e^x. float32's e^8 happens to be so
    close that the error is 1e-9 x. x / 8 is exact.
    """
    return mx.power(mx.array(math.exp(8), x.dtype), x * (sign / 8))


def row_sums(x: mx.array) -> mx.array:
    """Sums over the last axis, kept as 1; long rows in pieces, so that small terms are not lost."""
    num_pieces, rest = divmod(x.shape[-1], PIECE)
    if num_pieces == 0:
        return x @ mx.ones((x.shape[-1], 1), x.dtype)
    pieces = mx.unflatten(x[..., : num_pieces * PIECE], -1, (num_pieces, PIECE))
    sums = row_sums((pieces @ mx.ones((PIECE, 1), x.dtype)).squeeze(-1))
    return sums + row_sums(x[..., -rest:]) if rest else sums


def attention(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask_B1TS: mx.array) -> mx.array:
    """softmax(q k^T / sqrt(K)) v over the keys where the mask is true, at least one for each query."""
    bias_B1TS = mx.where(mask_B1TS, mx.array(0, q_BHTK.dtype), mx.array(-math.inf, q_BHTK.dtype))
    return _mixed(q_BHTK, k_BGSK, v_BGSK, bias_B1TS)[0]


@mx.custom_function
def _mixed(
    q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, bias_B1TS: mx.array
) -> tuple[mx.array, mx.array]:
    """The mix of values and the weights; X = T H / G are the queries that share a key/value head."""
    scores_BGXS = by_key_head(q_BHTK, k_BGSK) * q_BHTK.shape[-1] ** -0.5 @ k_BGSK.swapaxes(-1, -2)
    scores_BHTS = widened(scores_BGXS.reshape(*q_BHTK.shape[:3], -1) + bias_B1TS)
    e_BHTS = exp(scores_BHTS - scores_BHTS.max(axis=-1, keepdims=True))
    w_BGXS = (e_BHTS / row_sums(e_BHTS)).astype(scores_BGXS.dtype).reshape(scores_BGXS.shape)
    return (w_BGXS @ v_BGSK).reshape(q_BHTK.shape), w_BGXS


@_mixed.vjp
def _mixed_gradient(primals: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
    """dv = w^T d;  dw = d v^T;  dscores = w (dw - <w, dw>)."""
    q_BHTK, k_BGSK, v_BGSK, bias_B1TS = primals
    q_BGXK, d_BGXK, w_BGXS = by_key_head(q_BHTK, k_BGSK), by_key_head(cotangents[0], k_BGSK), outputs[1]
    dw_BGXS = d_BGXK @ v_BGSK.swapaxes(-1, -2)
    w_dw_BGXS = w_BGXS * dw_BGXS
    dscores_BGXS = (w_dw_BGXS - w_BGXS * row_sums(w_dw_BGXS)) * q_BHTK.shape[-1] ** -0.5
    dq_BHTK = (dscores_BGXS @ k_BGSK).reshape(q_BHTK.shape)
    dk_BGSK, dv_BGSK = dscores_BGXS.swapaxes(-1, -2) @ q_BGXK, w_BGXS.swapaxes(-1, -2) @ d_BGXK
    return [dq_BHTK, dk_BGSK, dv_BGSK, mx.zeros_like(bias_B1TS)]


def by_key_head(x_BHTK: mx.array, k_BGSK: mx.array) -> mx.array:
    """x_BGXK: the heads that share a key/value head one after the other, X = T H / G."""
    B, G, _, K = k_BGSK.shape
    return x_BHTK.reshape(B, G, -1, K)


def gate(gate_BTF: mx.array, up_BTF: mx.array) -> tuple[mx.array, mx.array]:
    """silu(gate) * up, and s = sigmoid(gate), kept for the gradient: an exponential is dear."""
    s_BTF = (1 / (1 + exp(widened(gate_BTF), -1))).astype(gate_BTF.dtype)  # 0 where the power is infinite
    return gate_product(gate_BTF, up_BTF, s_BTF), s_BTF


def gate_product(gate_BTF: mx.array, up_BTF: mx.array, s_BTF: mx.array) -> mx.array:
    return gate_BTF * s_BTF * up_BTF


def gate_gradient(
    gate_BTF: mx.array, up_BTF: mx.array, s_BTF: mx.array, d_BTF: mx.array
) -> tuple[mx.array, mx.array]:
    d_s_BTF = d_BTF * s_BTF
    return d_s_BTF * up_BTF * (1 + gate_BTF * (1 - s_BTF)), d_s_BTF * gate_BTF


def gated(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    return _gated(gate_BTF, up_BTF)[0]


_gated = mx.custom_function(gate)
_gated.vjp(lambda inputs, d, outputs: gate_gradient(inputs[0], inputs[1], outputs[1], d[0]))


def cross_entropy(logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple[mx.array, mx.array]:
    """-log softmax(logits)[target] where the mask is true, else 0, and the gradient of their sum.

    One exponential serves both.
    """
    row_N = mx.arange(len(targets_N))
    logits_NV = mx.where(mask_N[:, None], logits_NV, 0)  # masked rows may hold NaN, and NaN * 0 is NaN
    shifted_NV = logits_NV - logits_NV.max(axis=-1, keepdims=True)
    chosen_N = shifted_NV[row_N, targets_N]
    e_NV = exp(shifted_NV)
    sum_N1 = row_sums(e_NV)
    softmax_NV = e_NV * (mask_N[:, None] / sum_N1)
    gradient_NV = softmax_NV.at[row_N, targets_N].add(-mask_N.astype(logits_NV.dtype))
    return mx.where(mask_N, mx.log(sum_N1).squeeze(-1) - chosen_N, 0), gradient_NV
