"""The primitives that the model is made of: one namespace, so that all of them can be swapped at once.

Here stand MLX's production kernels. On MLX's CPU several compute in float32 whatever their input says, so the
float64 tests put exact compositions in their place. Sources as in `model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

MAX_EXPONENT = 80.0  # e^80 = 5.5e34 is still a float32


def rms_norm(x_BTD: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    """weight * x / sqrt(mean(x^2) + eps)."""
    return mx.fast.rms_norm(x_BTD, weight_D, eps)


def rope(x_BHTK: mx.array, frequency_P: Sequence[float], offset: int = 0) -> mx.array:
    """Turn the pair (x[k], x[k + K/2]) at time t by the angle (t + offset) * frequency[k]."""
    K = x_BHTK.shape[-1]
    period_P = mx.array([1 / frequency for frequency in frequency_P])  # what MLX calls freqs
    return mx.fast.rope(x_BHTK, K, traditional=False, base=None, scale=1.0, offset=offset, freqs=period_P)


def rope_at(x_BHTK: mx.array, frequency_P: Sequence[float], position_BT: mx.array) -> mx.array:
    """The same with a position of its own for each token: by the angle position[b, t] * frequency[k]."""
    angle_B1TP = position_BT[:, None, :, None] * mx.array(frequency_P)
    cos, sin = mx.cos(angle_B1TP).astype(x_BHTK.dtype), mx.sin(angle_B1TP).astype(x_BHTK.dtype)
    left, right = mx.split(x_BHTK, 2, axis=-1)
    return mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array) -> mx.array:
    """softmax(q k^T / sqrt(K)) v, causal, with the last query at the last key (T <= S)."""
    scale = q_BHTK.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, scale=scale, mask="causal")


def masked_attention(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask_B1TS: mx.array) -> mx.array:
    """The same where the mask, and not only time, says which keys a query sees; it must see one."""
    scale = q_BHTK.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, scale=scale, mask=mask_B1TS)


def exp(x: mx.array) -> mx.array:
    """e^x. On a CPU `mx.power(e, x)` is as exact as `mx.exp` and nearly three times as fast."""
    return mx.exp(x) if mx.default_device() == mx.gpu else mx.power(mx.array(math.e, x.dtype), x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x) = x / (1 + e^-x).

    The exponent is capped before float32 overflows, because the gradient of x / infinity is not a number.
    """
    return x / (1 + exp(mx.minimum(-x, MAX_EXPONENT)))


def gated(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    """silu(gate) * up; its gradient is d up * s (1 + gate (1 - s)) and d gate * s, with s = sigmoid(gate).

    An exponential is dear on a CPU, which keeps s for the gradient, and cheap on a GPU, which makes it again.
    """
    if mx.default_device() == mx.gpu:
        return _gated_forgetting(gate_BTF, up_BTF)
    return _gated_keeping(gate_BTF, up_BTF)[0]


@mx.custom_function  # type: ignore[untyped-decorator]
def _gated_keeping(gate_BTF: mx.array, up_BTF: mx.array) -> tuple[mx.array, mx.array]:
    s_BTF = sigmoid(gate_BTF)
    return gate_BTF * s_BTF * up_BTF, s_BTF


@_gated_keeping.vjp  # type: ignore[untyped-decorator]
def _gradient_with_s(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array]:
    (gate_BTF, up_BTF), d_BTF, s_BTF = primals, cotangents[0], outputs[1]
    d_s_BTF = d_BTF * s_BTF
    return d_s_BTF * up_BTF * (1 + gate_BTF * (1 - s_BTF)), d_s_BTF * gate_BTF


@mx.custom_function  # type: ignore[untyped-decorator]
def _gated_forgetting(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    return gate_BTF * sigmoid(gate_BTF) * up_BTF


@_gated_forgetting.vjp  # type: ignore[untyped-decorator]
def _gradient_without_s(primals: tuple, d_BTF: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    """MLX: a compiler keeps what two results share, so `depends` makes gate another one each time."""
    gate_BTF, up_BTF = mx.depends(list(primals), [d_BTF])
    s_BTF = sigmoid(gate_BTF)
    d_gate_BTF = d_BTF * up_BTF * s_BTF * (1 + gate_BTF * (1 - s_BTF))
    (gate_BTF,) = mx.depends([gate_BTF], [d_gate_BTF])
    return d_gate_BTF, d_BTF * gate_BTF * sigmoid(gate_BTF)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), the exponent capped as in `silu`."""
    return 1 / (1 + exp(mx.minimum(-x, MAX_EXPONENT)))


def logsumexp(x_NV: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last axis."""
    return mx.logsumexp(x_NV, axis=-1)


def logsumexp_and_softmax(x_NV: mx.array) -> tuple[mx.array, mx.array]:
    """Both over the last axis; on a CPU from the same exponentials."""
    if mx.default_device() == mx.gpu:
        total_N = mx.logsumexp(x_NV, axis=-1)
        return total_N, mx.exp(x_NV - total_N[:, None])
    top_N1 = x_NV.max(axis=-1, keepdims=True)
    e_NV = exp(x_NV - top_N1)
    sum_N1 = e_NV.sum(axis=-1, keepdims=True)
    return (mx.log(sum_N1) + top_N1).squeeze(-1), e_NV / sum_N1


def widened(x: mx.array) -> mx.array:
    """In float32 at least."""
    return x.astype(mx.float32) if x.itemsize < 4 else x
