"""For generation, which calls the pattern's modules: quantized ones unpack their weights where it is faster.

A product of few rows, such as one token of one prompt, is faster with the weight as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..lora import DoRALinear
from . import packed

MIN_ROWS = 4  # measured: in 4 bits two rows are slower unpacked, four as fast or up to twice as fast


def has_few_rows(x_BTI: mx.array) -> bool:
    return x_BTI.size < MIN_ROWS * x_BTI.shape[-1]


def has_packed(module: nn.Module) -> bool:
    return packed.packed_of(module.linear if isinstance(module, DoRALinear) else module) is not None


class UnpackingLinear(nn.QuantizedLinear):
    def __call__(self, x_BTI: mx.array) -> mx.array:
        return super().__call__(x_BTI) if has_few_rows(x_BTI) else packed.call(self, x_BTI)


class UnpackingEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x_BTD: mx.array) -> mx.array:
        return super().as_linear(x_BTD) if has_few_rows(x_BTD) else packed.call(self, x_BTD)


class UnpackingDoRA(DoRALinear):
    """Always: the length of each row needs the weight in full anyway."""

    def __call__(self, x_BTI: mx.array) -> mx.array:
        return packed.call(self, x_BTI)


UNPACKING: dict[Any, type[nn.Module]] = {
    nn.QuantizedLinear: UnpackingLinear,
    nn.QuantizedEmbedding: UnpackingEmbedding,
    DoRALinear: UnpackingDoRA,
}


@contextmanager
def unpacking_first(model: nn.Module) -> Iterator[None]:
    """Inside the `with` the model's quantized modules are of the classes above.

    On a GPU `packed.is_unpacked_for` leaves most products as they are.
    """
    modules: list[Any] = [m for m in model.modules() if type(m) in UNPACKING and has_packed(m)]
    for module in modules:
        module.__class__ = UNPACKING[type(module)]
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = type(module).__base__
