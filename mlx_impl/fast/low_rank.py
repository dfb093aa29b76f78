"""The parts of a linear with an adapter, as `projection.py` computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..lora import DoRALinear, LoRALinear
from .packed import Weight, packed_of
from .rounded import Rounded, rounded_of


class LowRank(NamedTuple):
    """y = x V^T + bias with V = W + scale * (A B)^T; with a magnitude m, y = x V^T m / |V| + bias."""

    weight_OI: Weight
    bias_O: mx.array | None
    a_IR: mx.array
    b_RO: mx.array
    scale: float
    magnitude_O: mx.array | None = None
    dropout: Callable[[mx.array], mx.array] | None = None  # where it is on: A gets dropout(x)
    rounded: Rounded | None = None  # where the factors are in the type of x already

    def finish(self, y_NO: mx.array, lengths_O: Iterator[mx.array]) -> mx.array:
        """y of x V^T; the next of the lengths, which are constants, is that of V's rows."""
        if self.magnitude_O is not None:
            y_NO = (self.magnitude_O / mx.stop_gradient(next(lengths_O))).astype(y_NO.dtype) * y_NO
        return y_NO if self.bias_O is None else y_NO + self.bias_O


def low_rank_of(linear: nn.Module) -> LowRank | None:
    """Its parts; None without an adapter."""
    if not isinstance(linear, LoRALinear) or type(linear) not in (LoRALinear, DoRALinear):
        return None
    dropout = linear.dropout if linear.training and linear.dropout.p > 0 else None
    base = linear.linear
    weight_OI = base.weight if type(base) is nn.Linear else packed_of(base)
    if weight_OI is None:
        return None
    return LowRank(
        weight_OI=weight_OI,
        bias_O=base.get("bias"),
        a_IR=linear.lora_a,
        b_RO=linear.lora_b,
        scale=linear.scale,
        magnitude_O=linear.get("magnitude"),
        dropout=dropout,
        rounded=rounded_of(linear),
    )
