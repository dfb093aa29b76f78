"""The primitives that the model is made of: one namespace, so that all of them can be swapped at once.

Here stand MLX's production kernels, and on a CPU `cpu_ops.py` for attention, gate and cross-entropy. On MLX's
CPU several operations compute in float32 whatever their input says, so the float64 tests put exact
compositions in their place. The gate before an adapted linear is `projection.project_gated`, which takes
`gated` on a GPU and its parts, from `cpu_ops.py`, on a CPU. Sources as in `model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .fast import cpu_ops

MAX_EXPONENT = 80.0  # e^80 = 5.5e34 is still a float32


def on_gpu() -> bool:
    return bool(mx.default_device() == mx.gpu)


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
    if not on_gpu():
        T, S = q_BHTK.shape[2], k_BGSK.shape[2]
        return cpu_ops.attention(q_BHTK, k_BGSK, v_BGSK, mx.arange(S) <= mx.arange(S - T, S)[:, None])
    scale = q_BHTK.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, scale=scale, mask="causal")


def masked_attention(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask_B1TS: mx.array) -> mx.array:
    """The same where the mask, and not only time, says which keys a query sees; it must see one."""
    if not on_gpu():
        return cpu_ops.attention(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)
    scale = q_BHTK.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, scale=scale, mask=mask_B1TS)


def gated(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    """silu(gate) * up; its gradient is d up * s (1 + gate (1 - s)) and d gate * s, with s = sigmoid(gate).

    An exponential is dear on a CPU, which keeps s for the gradient, and cheap on a GPU, which makes it again.
    """
    return _gated_forgetting(gate_BTF, up_BTF) if on_gpu() else cpu_ops.gated(gate_BTF, up_BTF)


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


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), the exponent capped before float32 overflows: the gradient of 1 / infinity is none."""
    exponent = mx.minimum(-x, MAX_EXPONENT)
    e = mx.exp(exponent) if on_gpu() else cpu_ops.exp(widened(exponent)).astype(x.dtype)
    return 1 / (1 + e)


def logsumexp(x_NV: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last axis."""
    return mx.logsumexp(x_NV, axis=-1)


def cross_entropy(logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple[mx.array, mx.array]:
    """-log softmax(logits)[target] where the mask is, else 0, and the gradient of their sum by the logits."""
    if not on_gpu():
        return cpu_ops.cross_entropy(logits_NV, targets_N, mask_N)
    N, V = logits_NV.shape
    total_N = mx.logsumexp(logits_NV, axis=-1)
    chosen_N = logits_NV.flatten()[mx.arange(N) * V + targets_N]
    is_target_NV = mx.arange(V) == targets_N[:, None]
    gradient_NV = mx.where(mask_N[:, None], mx.exp(logits_NV - total_N[:, None]) - is_target_NV, 0)
    return mx.where(mask_N, total_N - chosen_N, 0), gradient_NV


widened = cpu_ops.widened
