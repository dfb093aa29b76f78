"""Rung 1: primitives with a wrong value or a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl import ops
from mlx_impl.fast import cpu_ops
from tests.trainers.mutants.mutant import PLAIN, Mutant

attention, rms_norm, rope, logsumexp = ops.attention, ops.rms_norm, ops.rope, ops.logsumexp


def op(name: str, broken: Any) -> dict[str, Any]:
    return {f"mlx_impl.ops.{name}": broken}


def fast_op(name: str, broken: Any) -> dict[str, Any]:
    return {f"mlx_impl.fast.ops.{name}": broken}


def rope_of_neighbours(x_BHTK: mx.array, frequency_P: Any, offset: Any) -> mx.array:
    if not isinstance(offset, int):
        return rope(x_BHTK, frequency_P, offset)
    period_P, K = mx.array([1 / frequency for frequency in frequency_P]), x_BHTK.shape[-1]
    return mx.fast.rope(x_BHTK, K, traditional=True, base=None, scale=1.0, offset=offset, freqs=period_P)


def rope_of_rounded_angles(x_BHTK: mx.array, frequency_P: Any, offset: Any) -> mx.array:
    if not isinstance(offset, int):
        return rope(x_BHTK, frequency_P, offset)
    times_T1 = mx.arange(offset, offset + x_BHTK.shape[2])[:, None]
    angle_TP = (times_T1 * mx.array(frequency_P)).astype(mx.bfloat16).astype(mx.float32)
    left, right = mx.split(x_BHTK, 2, axis=-1)
    cos, sin = mx.cos(angle_TP), mx.sin(angle_TP)
    return mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention_to_everything(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask: Any) -> mx.array:
    every_key = mx.ones((1, 1, q_BHTK.shape[2], k_BGSK.shape[2])) == 1
    return attention(q_BHTK, k_BGSK, v_BGSK, every_key if mask is None else mask)


def attention_unscaled(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask: Any) -> mx.array:
    return attention(q_BHTK * q_BHTK.shape[-1] ** 0.5, k_BGSK, v_BGSK, mask)


def attention_of_tiled_heads(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask: Any) -> mx.array:
    times = (1, q_BHTK.shape[1] // k_BGSK.shape[1], 1, 1)
    return attention(q_BHTK, mx.tile(k_BGSK, times), mx.tile(v_BGSK, times), mask)


def norm_plus_eps(x_BTD: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    return weight_D * x_BTD / (mx.sqrt(mx.square(x_BTD).mean(axis=-1, keepdims=True)) + eps)


def without_shift(x_NV: mx.array) -> mx.array:
    return mx.log(mx.exp(x_NV).sum(axis=-1))


@mx.custom_function
def by_first_cotangent(x_NV: mx.array) -> mx.array:
    return logsumexp(x_NV)


@by_first_cotangent.vjp
def _(x_NV: mx.array, cotangent_N: mx.array, _output: mx.array) -> mx.array:
    return cotangent_N[0] * mx.softmax(x_NV, axis=-1)


def gate_left_out_backwards(gate_BTF: mx.array, up_BTF: mx.array) -> mx.array:
    """The value is right; the gradient of up is sigmoid(gate) instead of gate * sigmoid(gate)."""
    stop = mx.stop_gradient
    return ops.silu(gate_BTF) * stop(up_BTF) + stop(mx.sigmoid(gate_BTF)) * (up_BTF - stop(up_BTF))


def half_silu(x: mx.array) -> mx.array:
    return x * mx.stop_gradient(mx.sigmoid(x))


def rounded_logsumexp(x_NV: mx.array) -> mx.array:
    return logsumexp(x_NV.astype(mx.bfloat16)).astype(mx.float32)


def cross_entropy_of(broken: Callable[[mx.array], mx.array]) -> dict[str, Any]:
    """A bug in the log-sum-exp of the fast path's loss."""
    return fast_op("cross_entropy", lambda *arguments: cross_entropy_by(broken, *arguments))


def cross_entropy_by(
    logsumexp: Callable[[mx.array], mx.array], logits_NV: mx.array, targets_N: mx.array, mask_N: mx.array
) -> tuple[mx.array, mx.array]:
    """The cross-entropy in nats and its gradient, from the given log-sum-exp."""
    total_N1, is_target_NV = (
        logsumexp(logits_NV)[:, None],
        mx.arange(logits_NV.shape[1]) == targets_N[:, None],
    )
    nats_N = (total_N1 - mx.where(is_target_NV, logits_NV, 0).sum(axis=-1, keepdims=True)).squeeze(-1)
    gradient_NV = cpu_ops.exp(logits_NV - total_N1) - is_target_NV
    return mx.where(mask_N, nats_N, 0), mx.where(mask_N[:, None], gradient_NV, 0)


MUTANTS = [
    Mutant(
        "rope-interleaved",
        1,
        "RoPE rotates neighbouring elements as a pair, but the checkpoint pairs element k with k + K/2. "
        "Text stays fluent for a few words and then drifts.",
        op("rope", rope_of_neighbours),
    ),
    Mutant(
        "rope-without-offset",
        1,
        "RoPE counts from 0 in every call, so a token after a filled cache gets position 0 again.",
        op("rope", lambda x, frequencies, at: rope(x, frequencies, 0 if isinstance(at, int) else at)),
    ),
    Mutant(
        "rope-angles-in-bfloat16",
        1,
        "RoPE's angles are computed in bfloat16, whose eight bits cannot tell late positions apart.",
        op("rope", rope_of_rounded_angles),
        "transformers#29285",
    ),
    Mutant(
        "attention-not-causal",
        1,
        "There is no causal mask: every token sees the tokens it must predict, and the loss looks wonderful.",
        fast_op("attention", attention_to_everything),
    ),
    Mutant(
        "attention-unscaled",
        1,
        "The attention scores are not divided by sqrt(K), so the softmax is far too sharp.",
        op("attention", attention_unscaled),
        trainer=PLAIN,
    ),
    Mutant(
        "attention-heads-tiled",
        1,
        "Query heads 0, 1, 2 are given key/value heads 0, 1, 0 where grouped attention means 0, 0, 0.",
        fast_op("attention", attention_of_tiled_heads),
    ),
    Mutant(
        "norm-eps-fixed",
        1,
        "RMSNorm uses a fixed eps of 1e-6 instead of the configuration's 1e-5.",
        op("rms_norm", lambda x, weight, eps: rms_norm(x, weight, 1e-6)),
        "torchtune#409",
    ),
    Mutant(
        "norm-eps-outside-the-root",
        1,
        "RMSNorm adds eps to the square root instead of under it.",
        op("rms_norm", norm_plus_eps),
    ),
    Mutant(
        "silu-is-gelu",
        1,
        "The activation is GELU, which looks like SiLU and is the default of many layer libraries.",
        op("silu", nn.gelu),
        trainer=PLAIN,
    ),
    Mutant(
        "silu-half-derivative",
        1,
        "A kernel's backward pass treats the sigmoid as a constant. Losses are right, gradients are not.",
        op("silu", half_silu),
        trainer=PLAIN,
    ),
    Mutant(
        "gate-left-out-backwards",
        1,
        "The backward pass of the fused silu(gate) * up leaves a factor of gate out of the gradient of up.",
        fast_op("gated", gate_left_out_backwards),
    ),
    Mutant(
        "logsumexp-first-cotangent",
        1,
        "The fused cross-entropy's backward pass multiplies every row by the first row's cotangent: "
        "right for a plain sum, wrong as soon as tokens are weighted.",
        op("logsumexp", by_first_cotangent),
        "Liger-Kernel#968",
        trainer=PLAIN,
    ),
    Mutant(
        "logsumexp-in-bfloat16",
        1,
        "The cross-entropy is computed in bfloat16, so the loss has only two or three right digits.",
        cross_entropy_of(rounded_logsumexp),
        "Liger-Kernel#512",
    ),
    Mutant(
        "logsumexp-without-shift",
        1,
        "log-sum-exp does not subtract the maximum: right for small logits, infinite for one above 88.",
        op("logsumexp", without_shift),
        trainer=PLAIN,
    ),
]
