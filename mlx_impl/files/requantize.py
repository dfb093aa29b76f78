"""Quantize a changed weight W + dW again, each group with the base's scale and bias or with new ones.

The values scale * q + bias, for all q, are a group's grid. Rounding W + dW to the base's grid is never worse
than keeping W. A new grid fitted to W + dW can be finer, but can also move every weight of the group by more
than dW does. So each group takes the grid with the smaller squared error. (mlx-lm always fits a new one.)
Axis letters of its own: C groups per row, L weights per group.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .quantized import Quantized

Parts = tuple[mx.array, mx.array, mx.array]  # q, packed into words or not; scales; biases


def requantize(weight_OI: mx.array, base: Quantized, dtype: mx.Dtype) -> Parts:
    """Packed q, scales and biases in the base's group size and bits, scales and biases in this dtype."""
    groups_OCL = weight_OI.reshape(weight_OI.shape[0], -1, base.group_size)
    _, new_scales, new_biases = mx.quantize(weight_OI.astype(dtype), base.group_size, base.bits)
    old = round_to_grid(groups_OCL, base.scales, base.biases, base.bits)
    new = round_to_grid(groups_OCL, new_scales, new_biases, base.bits)
    is_old_OC1 = squared_errors(groups_OCL, *old) <= squared_errors(groups_OCL, *new)
    q, scales, biases = (mx.where(is_old_OC1, a, b) for a, b in zip(old, new, strict=True))
    words = pack_bits(q.reshape(weight_OI.shape), base.bits)
    return words, scales[..., 0].astype(dtype), biases[..., 0].astype(dtype)


def round_to_grid(groups_OCL: mx.array, scales_OC: mx.array, biases_OC: mx.array, bits: int) -> Parts:
    """The q in 0 .. 2**bits - 1 nearest to (w - bias) / scale, or 0 if the scale is 0; scales and biases."""
    scale_OC1, bias_OC1 = (part.astype(mx.float32)[..., None] for part in (scales_OC, biases_OC))
    divisor_OC1 = mx.where(scale_OC1 == 0, mx.inf, scale_OC1)
    q_OCL = mx.clip(mx.round((groups_OCL - bias_OC1) / divisor_OC1), 0, 2**bits - 1)
    return q_OCL, scale_OC1, bias_OC1


def squared_errors(
    groups_OCL: mx.array, q_OCL: mx.array, scale_OC1: mx.array, bias_OC1: mx.array
) -> mx.array:
    return mx.square(scale_OC1 * q_OCL + bias_OC1 - groups_OCL).sum(axis=-1, keepdims=True)


def pack_bits(q_OI: mx.array, bits: int) -> mx.array:
    """Pack each row into uint32 words as `mlx.core.quantize` does: one stream of bits, lowest bit first."""
    q = np.array(q_OI.astype(mx.uint8))
    stream = (q[..., None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(len(q), -1)
    return mx.array(np.packbits(stream, axis=1, bitorder="little").view("<u4"))
