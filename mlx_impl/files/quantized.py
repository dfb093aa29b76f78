"""Linears whose weights are stored in a few bits, beside plain ones.

Each row of a weight is cut into groups of `group_size`; within a group w = scale * q + bias, where q is a
whole number of `bits` bits, packed into uint32 (MLX documentation, `mlx.core.quantize`, mode "affine"). The
model computes with the packed weight; what a formula needs in full is unpacked here.
No twin in reference/, which is given the unpacked weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..disk.files import one_line
from ..lora import dense_weight_OI


@dataclass(frozen=True)
class Packing:
    group_size: int
    bits: int


def pack(model: nn.Module, packings: dict[str, Packing]) -> None:
    """Make the named linears and embeddings quantized ones, whose weights are then to be loaded.

    Raises ValueError that names the module that cannot be packed so.
    """
    modules = dict(model.named_modules())
    packed = []
    for name, packing in packings.items():
        try:
            packed.append((name, modules[name].to_quantized(packing.group_size, packing.bits)))
        except (KeyError, AttributeError):
            raise ValueError(f"only linears and embeddings can be quantized, and {name} is none") from None
        except (ValueError, TypeError) as error:  # TypeError for a number that no machine word holds
            raise ValueError(f"{name} cannot have weights of {packing}: {one_line(error)}") from None
    model.update_modules(tree_unflatten(packed))


def dequantize(model: nn.Module) -> None:
    """Put plain linears and embeddings in the place of quantized ones."""
    plain = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            plain.append((name, with_weight(module, dense_weight_OI(module))))
    model.update_modules(tree_unflatten(plain))


def dense_numbers(model: nn.Module) -> int:
    """How many numbers the packed weights unpack to."""
    packed = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    modules = (module for _, module in model.named_modules() if isinstance(module, packed))
    return sum(module.weight.size * 32 // module.bits for module in modules)


def with_weight(module: nn.Module, weight_OI: mx.array) -> nn.Linear | nn.Embedding:
    """A plain linear or embedding with this weight in full, and the bias that the module has."""
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        new: nn.Linear | nn.Embedding = nn.Embedding(1, 1)
    else:
        new = nn.Linear(1, 1, bias=False)
    new.weight = weight_OI
    if "bias" in module:
        new.bias = module.bias
    return new
