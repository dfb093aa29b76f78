"""The dtype of the frozen model and its arithmetic: float32, or bfloat16 for half the memory.

LoRA factors, optimizer moments and the loss are float32 with either. Gradients are computed in the model's
dtype and converted to float32 before they are summed.
float16 is not offered because its largest number is 65504: the small SmolLM2-135M already has an activation
of 24926, and small gradients would need loss scaling (Micikevicius et al. 2018, "Mixed Precision Training",
section 3.2). bfloat16 has the range of float32.
No twin in reference/, which gets the rounded weights and computes in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from ..model import CausalLM

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def to_dtype(name: str) -> mx.Dtype:
    """The MLX dtype of this name; ValueError for any other than these two."""
    if name not in DTYPES:
        reason = ", whose largest number, 65504, activations can exceed" if name == "float16" else ""
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {name!r}{reason}")
    return DTYPES[name]


def dtype_of(model: CausalLM) -> str:
    """The name of the dtype that the model computes in. Its norms tell: they are never quantized."""
    return str(model.model.norm.weight.dtype).removeprefix("mlx.core.")


def cast_finite(what: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """The array in this dtype, evaluated so that the source can be freed; ValueError if it is not finite."""
    array = array.astype(dtype)
    if not mx.isfinite(array).all():
        raise ValueError(f"{what} must be finite, got infinity or NaN")
    return array
