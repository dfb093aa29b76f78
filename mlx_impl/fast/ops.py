"""The primitives of the fast path: MLX's kernels on a GPU, `cpu_ops.py` on a CPU.

`rms_norm` and `rope` are those of the pattern; they are here so that the ladder's rung 1 judges them too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx
import numpy as np

from .. import ops
from ..ops import widened
from . import cpu_ops, query_chunks


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def rms_norm(x_BTD: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    return ops.rms_norm(x_BTD, weight_D, eps)


def rope(x_BHTK: mx.array, frequency_P: tuple[float, ...], position: int | mx.array) -> mx.array:
    return ops.rope(x_BHTK, frequency_P, position)


def attention(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask_B1TS: mx.array | None) -> mx.array:
    """softmax(q k^T / sqrt(K)) v over the keys where the mask is true; without one it is causal (T <= S)."""
    if on_gpu():
        return ops.attention(q_BHTK, k_BGSK, v_BGSK, added_mask(mask_B1TS, q_BHTK.dtype))
    if mask_B1TS is None:
        (B, H, T, _), S = q_BHTK.shape, k_BGSK.shape[2]
        if T == S and query_chunks.are_needed(B * H * T * S):
            return query_chunks.attention(q_BHTK, k_BGSK, v_BGSK)
        mask_B1TS = mx.arange(S) <= mx.arange(S - T, S)[:, None]
    return cpu_ops.attention(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)


def added_mask(mask_B1TS: mx.array | None, dtype: mx.Dtype) -> mx.array | None:
    """What attention adds to the scores: 0 where the mask is true, else less than any score; for a GPU.

    All heads share it. Of a mask of booleans MLX's CUDA backend makes numbers for each head, in three arrays
    of H T S (`scaled_dot_product_attention` in its fast.cpp).
    Half of the type's least number, because cuDNN multiplies it by log2(e), and the whole one would overflow.
    """
    if mask_B1TS is None:
        return None
    return mx.where(mask_B1TS, mx.array(0, dtype), mx.array(mx.finfo(dtype).min / 2, dtype))


def rotated(x_BHTK: mx.array, wavelength_P: mx.array, position: int | mx.array) -> mx.array:
    """`rope` of tokens that follow one another from `position` on.

    It is a number, an array without an axis, or one of a number for each row: of an array of one number MLX's
    GPU kernels read what is behind it for the other rows (`offset_stride` in rope.cu). A CPU does not.
    """
    K = x_BHTK.shape[-1]
    return mx.fast.rope(
        x_BHTK, K, traditional=False, base=None, scale=1.0, offset=position, freqs=wavelength_P
    )


@cache
def wavelengths(frequency_P: tuple[float, ...]) -> mx.array:
    """What `mx.fast.rope` calls freqs, made once for a model."""
    wavelength_P = mx.array([1 / frequency for frequency in frequency_P])
    mx.eval(wavelength_P)
    return wavelength_P


def attention_of_any(
    q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask_B1TS: mx.array | None
) -> mx.array:
    """`attention` without a gradient: of one query in MLX's kernel, which needs no causal mask for it."""
    if q_BHTK.shape[2] > 1:
        return attention(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)
    scale = q_BHTK.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, scale=scale, mask=mask_B1TS)


def gated_once(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    """`gated` without a gradient: on a GPU in one kernel."""
    return gated_here()(gate_BTF, up_BTF)


def gated_here() -> Callable[[mx.array, mx.array], mx.array]:
    """The `gated_once` of the default device."""
    return _gated_in_one if on_gpu() else _gated_by_powers


def _gated_by_powers(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    return cpu_ops.gate(gate_BTF, up_BTF)[0]


@partial(mx.compile, shapeless=True)
def _gated_in_one(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    return gate_BTF * mx.sigmoid(gate_BTF) * up_BTF


def gated(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    """silu(gate) * up; its gradients are d up * s (1 + gate (1 - s)) and d gate * s, with s = sigmoid(gate).

    An exponential is slow on a CPU, which keeps s for the gradient; a GPU computes it again.
    """
    return _gated_recompute(gate_BTF, up_BTF) if on_gpu() else cpu_ops.gated(gate_BTF, up_BTF)


@mx.custom_function
def _gated_recompute(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    return gate_BTF * sigmoid(gate_BTF) * up_BTF


@_gated_recompute.vjp
def _gated_recompute_gradient(primals: tuple, d_BTF: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    """MLX: a compiler keeps what two results share, so `depends` makes gate a new array for each of them."""
    gate_BTF, up_BTF = mx.depends(list(primals), [d_BTF])
    s_BTF = sigmoid(gate_BTF)
    d_gate_BTF = d_BTF * up_BTF * s_BTF * (1 + gate_BTF * (1 - s_BTF))
    (gate_BTF,) = mx.depends([gate_BTF], [d_gate_BTF])
    return d_gate_BTF, gate_BTF * sigmoid(gate_BTF) * d_BTF  # the kernel of the forward pass


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x): one operation, a formula of several would take a GPU longer to compile."""
    return mx.sigmoid(x)


def cross_entropy(logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array) -> tuple[mx.array, mx.array]:
    """-log softmax(logits)[target] where the mask is true, else 0; and the gradient of their sum.

    Both in float32 or better.
    """
    if not on_gpu():
        return cpu_ops.cross_entropy(widened(logits_NV), targets_N, mask_N)
    N, V = logits_NV.shape
    target_logits_N = unfused(widened(logits_NV.flatten()[mx.arange(0, N * V, V) + targets_N]))
    logits_NV = widened(logits_NV)
    total_N = mx.logsumexp(logits_NV, axis=-1)
    is_target_NV = mx.arange(V) == targets_N[:, None]
    # Not exp(logits - total): float32 rounds the total of huge logits, and exp would turn that into a factor.
    gradient_NV = mx.where(mask_N[:, None], mx.softmax(logits_NV, axis=-1) - is_target_NV, 0)
    zeros_N = mx.array(np.zeros(N), total_N.dtype)
    return mx.where(mask_N, unfused(total_N - target_logits_N), zeros_N), gradient_NV


def unfused(x: mx.array) -> mx.array:
    """x by a kernel of its own, which MLX has ready; a fused one it would compile for seconds on a GPU."""
    return mx.depends([x], [])[0]


def scaled(scale: float | mx.array, x: mx.array) -> mx.array:
    """scale * x; `mx.compile` would fuse the product with the broadcast of the scale."""
    if not on_gpu():
        return scale * x
    scale = scale if isinstance(scale, mx.array) else mx.array(scale, x.dtype)
    return unfused(mx.broadcast_to(scale, x.shape)) * x


__all__ = ["attention", "cross_entropy", "gated", "on_gpu", "rms_norm", "rope", "sigmoid", "widened"]
