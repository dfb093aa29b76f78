"""Quantized weights: unpacked for one product, dropped after it, unpacked again for its gradient.

    y = x W^T        dx = dy W        w = scale * q + bias, a scale and a bias for each group of a row

Source of the layout: MLX documentation, `mlx.core.quantize`, mode "affine". On a CPU `mx.quantized_matmul`
takes 20 to 100 times as long for a batch as `mx.dequantize` and a BLAS; on an NVIDIA GPU it is slower from
CUDA_MIN_ROWS rows on. The weight is frozen, so that its gradient is never formed, and W need not be kept:
beside the packed weights there is one in full at a time. For that each unpacking waits (`mx.depends`) for
what its product multiplies; else MLX would unpack ahead, and a compiled step would unpack once for both
products and keep W in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..lora import DoRALinear, LoRALinear
from . import ops
from .unpacking import unpack

CUDA_MIN_ROWS = 512  # measured on an H200: as fast as packed there, 2.4 times as fast for 4,096 rows


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
        unpack_here = mx.dequantize if ops.on_gpu() else unpack
        return unpack_here(words_OW, scales_OG, biases_OG, self.group_size, self.bits)

    def part(self, rows: slice) -> Packed:
        """These rows of W."""
        return self._replace(**{name: getattr(self, name)[rows] for name in self._fields[:3]})

    def times(self, x: mx.array, transpose: bool) -> mx.array:
        """x W^T or x W as it is stored, for few rows on a GPU."""
        words, scales, biases, group_size, bits = self
        return mx.quantized_matmul(x, words, scales, biases, transpose, group_size, bits)


Weight = mx.array | Packed


def is_unpacked_for(num_rows: int) -> bool:
    """Whether a product of so many rows unpacks the weight first. Metal, not measured, never does."""
    return not ops.on_gpu() or (num_rows >= CUDA_MIN_ROWS and not mx.metal.is_available())


def packed_of(module: nn.Module) -> Packed | None:
    """The weight of a quantized linear or embedding."""
    if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) or module.mode != "affine":
        return None
    return Packed(module.weight, module.scales, module.biases, module.group_size, module.bits)


def unpacked(weight: Weight, after: mx.array) -> mx.array:
    return weight.unpacked_OI(after) if isinstance(weight, Packed) else weight


def ready(weight: Weight, num_rows: int, after: mx.array) -> Weight:
    """As a product of so many rows takes it: a packed one is unpacked, once `after` has been computed."""
    return unpacked(weight, after) if is_unpacked_for(num_rows) else weight


def add_product(y_NO: mx.array, x_NI: mx.array, weight: Weight) -> mx.array:
    """y + x W^T, the weight as `ready` gave it."""
    if isinstance(weight, Packed):
        return y_NO + weight.times(x_NI, transpose=True)
    return mx.addmm(y_NO, x_NI, weight.T)


def add_gradient(dx_NI: mx.array | None, dy_NO: mx.array, weight: Weight) -> mx.array:
    """dx + dy W, or dy W; a packed W is unpacked once dx, or else dy, has been computed."""
    weight = ready(weight, len(dy_NO), after=dy_NO if dx_NI is None else dx_NI)
    if isinstance(weight, Packed):
        of_weight_NI = weight.times(dy_NO, transpose=False)
        return of_weight_NI if dx_NI is None else dx_NI + of_weight_NI
    return dy_NO @ weight if dx_NI is None else mx.addmm(dx_NI, dy_NO, weight)


def product(x_NI: mx.array, packed: Packed) -> mx.array:
    """x W^T; differentiable by x."""
    if not is_unpacked_for(len(x_NI)):
        return packed.times(x_NI, transpose=True)

    @mx.custom_function
    def forward(x_NI: mx.array) -> mx.array:
        return x_NI @ packed.unpacked_OI(after=x_NI).T

    @forward.vjp
    def backward(_: mx.array, dy_NO: mx.array, __: mx.array) -> mx.array:
        return dy_NO @ packed.unpacked_OI(after=dy_NO)

    return forward(x_NI)


def product_in_parts(x_NI: mx.array, packed: Packed, rows: int) -> mx.array:
    """x W^T, so many rows of W unpacked at a time, and again for the gradient; differentiable by x."""
    slices = [slice(start, start + rows) for start in range(0, len(packed.words_OW), rows)]

    @mx.custom_function
    def forward(x_NI: mx.array) -> mx.array:
        ys: list[mx.array] = []
        for part in slices:
            weight = packed.part(part).unpacked_OI(after=ys[-1] if ys else x_NI)
            ys.append(x_NI @ weight.T)
        return mx.concatenate(ys, axis=-1)

    @forward.vjp
    def backward(_: mx.array, dy_NO: mx.array, __: mx.array) -> mx.array:
        dx_NI: mx.array | None = None
        for part in slices:
            dx_NI = add_gradient(dx_NI, dy_NO[:, part], packed.part(part))
        assert dx_NI is not None
        return dx_NI

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
        y_BTO = dora_product(linear, packed, x_BTI)
    else:
        y_BTO = mx.unflatten(product(x_BTI.flatten(0, -2), packed), 0, x_BTI.shape[:-1])
        if isinstance(linear, LoRALinear):
            y_BTO = y_BTO + linear.scale * linear.update_BTO(x_BTI)
    return y_BTO + base.bias if "bias" in base else y_BTO


def dora_product(linear: DoRALinear, packed: Packed, x_BTI: mx.array) -> mx.array:
    """`DoRALinear.__call__` without the bias: x V^T m / |V|."""
    delta_OI = mx.stop_gradient(LoRALinear.delta_OI(linear))
    y_NO, length_O = product_and_lengths(x_BTI.flatten(0, -2), packed, delta_OI)
    base_BTO = mx.unflatten(y_NO, 0, x_BTI.shape[:-1])
    direction_BTO = base_BTO + linear.scale * linear.update_BTO(x_BTI)
    return (linear.magnitude / length_O).astype(x_BTI.dtype) * direction_BTO
