"""The primitives of the model, in one namespace: MLX's own kernels, where they are accurate.

On MLX's CPU some of them compute in float32 even for float64 inputs, so the float64 tests replace this
namespace by exact compositions. Sources as in `model.py`.
Differs from reference/ops.py: `rope` also takes one number, the first token's position, and `attention` no
mask, so that MLX's kernels can be used; `logsumexp`, because MLX has no cross-entropy primitive; `widened`,
because sums of bfloat16 numbers are formed in float32.
"""

from __future__ import annotations

import mlx.core as mx

PIECE = 512  # terms of a float32 sum


def widened(x: mx.array) -> mx.array:
    """x in float32, or as it is if it has that precision already."""
    return x.astype(mx.float32) if x.itemsize < 4 else x


def rms_norm(x_BTD: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    """weight * x / sqrt(mean(x^2) + eps)."""
    return mx.fast.rms_norm(x_BTD, weight_D, eps)


def rope(x_BHTK: mx.array, frequency_P: tuple[float, ...], position: int | mx.array) -> mx.array:
    """Rotate each pair (x[k], x[k + K/2]) by the angle position * frequency[k].

    `position` is that of the first token, the others follow; or position_BT, one for each token.
    """
    if isinstance(position, int):
        wavelength_P = mx.array([1 / frequency for frequency in frequency_P])  # MLX calls it freqs
        K = x_BHTK.shape[-1]
        return mx.fast.rope(
            x_BHTK, K, traditional=False, base=None, scale=1.0, offset=position, freqs=wavelength_P
        )
    angle_B1TP = position[:, None, :, None] * mx.array(frequency_P)
    cos, sin = mx.cos(angle_B1TP).astype(x_BHTK.dtype), mx.sin(angle_B1TP).astype(x_BHTK.dtype)
    left, right = mx.split(x_BHTK, 2, axis=-1)
    return mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask_B1TS: mx.array | None) -> mx.array:
    """softmax(q k^T / sqrt(K)) v over the keys where the mask is true.

    Without a mask it is causal, the last query at the last key (T <= S).
    """
    scale = q_BHTK.shape[-1] ** -0.5
    mask: str | mx.array = "causal" if mask_B1TS is None else mask_B1TS
    return mx.fast.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, scale=scale, mask=mask)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * mx.sigmoid(x)


def logsumexp(x_NV: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last axis, first of pieces, then of the pieces' results.

    A single `mx.logsumexp` over a vocabulary of 49,152 is off by up to 2e-4 on a CPU: float32 loses small
    terms added to a large sum.
    """
    V = x_NV.shape[-1]
    if V <= PIECE:
        return mx.logsumexp(x_NV, axis=-1)
    padded_NV = mx.pad(x_NV, [(0, 0), (0, -V % PIECE)], constant_values=-mx.inf)
    return logsumexp(mx.logsumexp(mx.unflatten(padded_NV, -1, (-1, PIECE)), axis=-1))
