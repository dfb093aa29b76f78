"""The type that a frozen model is held and computed in: float32, or bfloat16, which takes half the memory.

Factors, moments and the loss are float32 in either; gradients are formed in the model's type and widened
before they are added up. bfloat16 has float32's range, so
that nothing need be scaled; float16 has not. Its largest number is 65504, where the small SmolLM2-135M has an
activation of 24926 already; `ops.sigmoid` forms e^80; and small gradients need a scaled loss (Micikevicius et
al. 2018, "Mixed Precision Training", section 3.2), which is not here.
No twin in reference/, which is given the rounded weights and computes in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from ..model import CausalLM

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def to_dtype(name: str) -> mx.Dtype:
    """MLX's type of this name; ValueError for another than the two."""
    if name not in DTYPES:
        reason = ", whose largest number, 65504, activations can exceed" if name == "float16" else ""
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {name!r}{reason}")
    return DTYPES[name]


def dtype_of(model: CausalLM) -> str:
    """The name of the type that the model computes in: that of its norms, which are never quantized."""
    return str(model.model.norm.weight.dtype).removeprefix("mlx.core.")


def rounded(what: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """The array in this type, computed, so that the other can go; ValueError where it is not finite then."""
    array = array.astype(dtype)
    if not mx.isfinite(array).all():
        raise ValueError(f"{what} must be finite, and is not everywhere")
    return array
