"""Quantized weights on a CPU: unpacked for one product, dropped after it, unpacked again for its gradient.

    y = x W^T        dx = dy W        w = scale * q + bias, a scale and a bias for each group of a row

Source of the layout: MLX documentation, `mlx.core.quantize`, mode "affine". On a CPU `mx.quantized_matmul`
takes 20 to 100 times as long for a batch as `mx.dequantize` and a BLAS. The weight is frozen, so that its
gradient is never formed, and W need not be kept: beside the packed weights there is one in full at a time.
For that each unpacking waits (`mx.depends`) for what its product multiplies; else MLX would unpack ahead, and
a compiled step would unpack once for both products and keep W in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..lora import DoRALinear, LoRALinear
from . import ops
from .unpacking import unpack


class Packed(NamedTuple):
    """A weight of shape (O, I), in words of 32 bits."""

    words_OW: mx.array
    scales_OG: mx.array
    biases_OG: mx.array
    group_size: int
    bits: int

    def unpacked_OI(self, after: mx.array) -> mx.array:
        """The weight in full, once `after` has been computed."""
        words_OW, scales_OG, biases_OG = mx.depends(list(self[:3]), [after])
        return unpack(words_OW, scales_OG, biases_OG, self.group_size, self.bits)


def unpacks_first() -> bool:
    """Whether a product with a quantized weight unpacks it first: on a CPU. A GPU multiplies as it is."""
    return not ops.on_gpu()


def packed_of(module: nn.Module) -> Packed | None:
    """The weight of a quantized linear or embedding, if its products unpack it first."""
    if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) or not unpacks_first():
        return None
    if module.mode != "affine":
        return None
    return Packed(module.weight, module.scales, module.biases, module.group_size, module.bits)


def full_OI(weight_OI: mx.array | Packed, after: mx.array) -> mx.array:
    """The weight in full; a packed one is unpacked once `after` has been computed."""
    return weight_OI.unpacked_OI(after) if isinstance(weight_OI, Packed) else weight_OI


def product(x_NI: mx.array, packed: Packed) -> mx.array:
    """x W^T; differentiable by x."""

    @mx.custom_function
    def forward(x_NI: mx.array) -> mx.array:
        return x_NI @ packed.unpacked_OI(after=x_NI).T

    @forward.vjp
    def backward(_: mx.array, dy_NO: mx.array, __: mx.array) -> mx.array:
        return dy_NO @ packed.unpacked_OI(after=dy_NO)

    return forward(x_NI)


def product_and_lengths(x_NI: mx.array, packed: Packed, delta_OI: mx.array) -> tuple[mx.array, mx.array]:
    """x W^T, and the length of each row of W + delta, from one unpacking; the lengths are constants."""

    @mx.custom_function
    def forward(x_NI: mx.array) -> tuple[mx.array, mx.array]:
        weight_OI = packed.unpacked_OI(after=x_NI)
        return x_NI @ weight_OI.T, mx.linalg.norm(weight_OI + delta_OI, axis=1)

    @forward.vjp
    def backward(_: mx.array, cotangents: tuple, __: tuple) -> mx.array:
        return cotangents[0] @ packed.unpacked_OI(after=cotangents[0])

    y_NO, length_O = forward(x_NI)
    return y_NO, mx.stop_gradient(length_O)


def call(linear: nn.Module, x_BTI: mx.array) -> mx.array:
    """linear(x), of any kind; a quantized weight is unpacked first where that is faster."""
    base: Any = linear.linear if isinstance(linear, LoRALinear) else linear
    packed = packed_of(base)
    if packed is None:
        return linear(x_BTI)
    if isinstance(linear, DoRALinear):
        y_BTO = stretched(linear, packed, x_BTI)
    else:
        y_BTO = mx.unflatten(product(x_BTI.flatten(0, -2), packed), 0, x_BTI.shape[:-1])
        if isinstance(linear, LoRALinear):
            y_BTO = y_BTO + linear.scale * linear.update_BTO(x_BTI)
    return y_BTO + base.bias if "bias" in base else y_BTO


def stretched(linear: DoRALinear, packed: Packed, x_BTI: mx.array) -> mx.array:
    """`DoRALinear.__call__` without the bias: x V^T m / |V|."""
    delta_OI = mx.stop_gradient(LoRALinear.delta_OI(linear))
    y_NO, length_O = product_and_lengths(x_BTI.flatten(0, -2), packed, delta_OI)
    base_BTO = mx.unflatten(y_NO, 0, x_BTI.shape[:-1])
    direction_BTO = base_BTO + linear.scale * linear.update_BTO(x_BTI)
    return (linear.magnitude / length_O).astype(x_BTI.dtype) * direction_BTO
