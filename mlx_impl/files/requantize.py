"""A weight into whole numbers of a few bits again: group by group in the base's grid, or in a new one.

A quantized W lies on its grid scale * q + bias. On that grid W + dW, rounded, is no farther from W + dW than
W is; a grid fitted to W + dW can be finer, and can move every weight of the group by more than dW does. So
each group takes the grid on which its squared error is smaller. (mlx-lm always takes a new one.) Letters
of its own: C groups a row, of L weights each.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Parts = tuple[mx.array, mx.array, mx.array]  # numbers, packed or not; scales, biases


def requantize(weight_OI: mx.array, base: nn.QuantizedLinear, dtype: mx.Dtype) -> Parts:
    """In the base's groups and bits, with scales and biases of this type."""
    groups_OCL = weight_OI.reshape(weight_OI.shape[0], -1, base.group_size)
    _, new_scales, new_biases = mx.quantize(weight_OI.astype(dtype), base.group_size, base.bits)
    old = on_grid(groups_OCL, base.scales, base.biases, base.bits)
    new = on_grid(groups_OCL, new_scales, new_biases, base.bits)
    is_old_OC1 = squared_errors(groups_OCL, *old) <= squared_errors(groups_OCL, *new)
    q, scales, biases = (mx.where(is_old_OC1, a, b) for a, b in zip(old, new, strict=True))
    words = pack(q.reshape(weight_OI.shape), base.bits)
    return words, scales[..., 0].astype(dtype), biases[..., 0].astype(dtype)


def on_grid(groups_OCL: mx.array, scales_OC: mx.array, biases_OC: mx.array, bits: int) -> Parts:
    """The q in 0 .. 2**bits - 1 for which scale * q + bias is nearest, 0 where the scale is; and the grid."""
    scale_OC1, bias_OC1 = (part.astype(mx.float32)[..., None] for part in (scales_OC, biases_OC))
    divisor_OC1 = mx.where(scale_OC1 == 0, mx.inf, scale_OC1)
    q_OCL = mx.clip(mx.round((groups_OCL - bias_OC1) / divisor_OC1), 0, 2**bits - 1)
    return q_OCL, scale_OC1, bias_OC1


def squared_errors(
    groups_OCL: mx.array, q_OCL: mx.array, scale_OC1: mx.array, bias_OC1: mx.array
) -> mx.array:
    return mx.square(scale_OC1 * q_OCL + bias_OC1 - groups_OCL).sum(axis=-1, keepdims=True)


def pack(q_OI: mx.array, bits: int) -> mx.array:
    """A row's numbers as one stream of bits, the lowest first, in words of 32 (`mlx.core.quantize`)."""
    q = np.array(q_OI.astype(mx.uint8))
    stream = (q[..., None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(len(q), -1)
    return mx.array(np.packbits(stream, axis=1, bitorder="little").view("<u4"))
