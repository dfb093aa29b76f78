"""The primitives of `mlx_impl.ops`, composed of operations that really compute in float64 on MLX's CPU.

On MLX's CPU, `exp`, `sin`, `cos` and whatever is built on them compute in float32 even for float64 input
(rung 0 has the table). `mx.power(e, x)`, `log`, `sqrt`, products and sums compute in float64, and NumPy
computes the sines and cosines of rope.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_impl import ops


def exp(x: mx.array) -> mx.array:
    return mx.power(mx.array(math.e, x.dtype), x)


def rms_norm(x_BTD: mx.array, weight_D: mx.array, eps: float) -> mx.array:
    return weight_D * x_BTD * mx.rsqrt(mx.square(x_BTD).mean(axis=-1, keepdims=True) + eps)


def rope(x_BHTK: mx.array, frequency_P: Sequence[float], position: int | mx.array) -> mx.array:
    position_BT = (
        position + np.arange(x_BHTK.shape[2])[None] if isinstance(position, int) else np.array(position)
    )
    angle_B1TP = position_BT[:, None, :, None] * np.array(frequency_P)
    cos, sin = (mx.array(f(angle_B1TP), x_BHTK.dtype) for f in (np.cos, np.sin))
    left, right = mx.split(x_BHTK, 2, axis=-1)
    return mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention(q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array, mask_B1TS: mx.array | None) -> mx.array:
    (B, H, T, K), (_, G, S, _) = q_BHTK.shape, k_BGSK.shape
    if mask_B1TS is None:
        mask_B1TS = (mx.arange(S) <= mx.arange(S - T, S)[:, None])[None, None]
    q_BGNTK = q_BHTK.reshape(B, G, H // G, T, K)
    scores_BGNTS = q_BGNTK @ k_BGSK[:, :, None].swapaxes(-1, -2) / math.sqrt(K)
    scores_BGNTS = mx.where(mask_B1TS[:, :, None], scores_BGNTS, -math.inf)
    weights = exp(scores_BGNTS - mx.stop_gradient(scores_BGNTS.max(axis=-1, keepdims=True)))
    mix_BGNTK = (weights / weights.sum(axis=-1, keepdims=True)) @ v_BGSK[:, :, None]
    return mix_BGNTK.reshape(B, H, T, K)


def silu(x: mx.array) -> mx.array:
    return x / (1 + exp(-x))


def logsumexp(x_NV: mx.array) -> mx.array:
    top_N1 = mx.stop_gradient(x_NV.max(axis=-1, keepdims=True))
    return mx.log(exp(x_NV - top_N1).sum(axis=-1)) + top_N1.squeeze(-1)


@contextmanager
def in_place_of_production() -> Iterator[None]:
    """Replaces the primitives of `mlx_impl.ops` by these."""
    with ExitStack() as stack:
        for function in (rms_norm, rope, attention, silu, logsumexp):
            stack.enter_context(patch.object(ops, function.__name__, function))
        yield
