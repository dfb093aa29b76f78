"""`mx.dequantize` on a CPU, to the bit and several times as fast: a table in place of shifts and masks.

w = scale * q + bias, with a scale and a bias for each group of weights. The numbers q of a row follow one
another, lowest bit first. The table has a line for each value of a byte: the numbers that it holds. Numbers
of 3, 5 and 6 bits straddle bytes; there it has a line for each value of 10 or 12 bits.
Source of the layout: MLX documentation, `mlx.core.quantize`, mode "affine".
"""

from __future__ import annotations

from functools import cache
from math import lcm

import mlx.core as mx
import numpy as np

# Bits of an index: whole numbers, and few enough for a small table.
INDEX_BITS = {2: 8, 3: 12, 4: 8, 5: 10, 6: 12}
INTEGERS = {2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # by bytes; an entry of a table is one of them


def unpack(
    words_OW: mx.array, scales_OG: mx.array, biases_OG: mx.array, group_size: int, bits: int
) -> mx.array:
    """w = scale * q + bias, of shape (O, I), in the type of the scales."""
    q_OGL = numbers(words_OW, bits, scales_OG.dtype).reshape(*scales_OG.shape, group_size)
    return (q_OGL * scales_OG[..., None] + biases_OG[..., None]).flatten(1)


def numbers(words_OW: mx.array, bits: int, dtype: mx.Dtype) -> mx.array:
    """Every q in this type."""
    if bits == 8:
        return words_OW.view(mx.uint8).astype(dtype)
    num = INDEX_BITS[bits] // bits
    stored = dtype if num * dtype.size in INTEGERS else mx.uint8  # four float32 numbers are too many
    entries = mx.take_along_axis(table_of(bits, stored), indices(words_OW, bits), 0)
    return entries.view(stored).astype(dtype)


def indices(words_OW: mx.array, bits: int) -> mx.array:
    """Each INDEX_BITS bits as a number; where they are not 8, each is found in two neighbouring bytes."""
    bytes_N, width = words_OW.view(mx.uint8).flatten(), INDEX_BITS[bits]
    if width == 8:
        return bytes_N
    bytes_MB = bytes_N.reshape(-1, lcm(width, 8) // 8).astype(mx.uint16)
    pairs = bytes_MB[:, :-1] | (bytes_MB[:, 1:] << 8)
    shifts = mx.arange(0, 8, width - 8, mx.uint16)  # each index begins so many bits later in its pair
    return ((pairs >> shifts) & (2**width - 1)).flatten()


@cache
def table_of(bits: int, dtype: mx.Dtype) -> mx.array:
    """The numbers that each index holds, lowest bits first, side by side in one integer."""
    width = INDEX_BITS[bits]
    shifts = np.arange(0, width, bits)
    numbers = (np.arange(2**width)[:, None] >> shifts) & (2**bits - 1)
    table = mx.array(numbers.flatten()).astype(dtype).view(INTEGERS[len(shifts) * dtype.size])
    mx.eval(table)  # once, and never as a part of a traced graph
    return table
