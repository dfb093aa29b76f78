"""Make linears and embeddings quantized, or plain again.

Each row of a weight is split into groups of `group_size`; in a group w = scale * q + bias, where q is an
integer of `bits` bits, packed into uint32 words (MLX documentation, `mlx.core.quantize`, mode "affine"). The
model computes with the quantized weight; where a formula needs the full weight, it is dequantized.
No twin in reference/, which gets the dequantized weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..disk.files import one_line
from ..lora import dense_weight_OI

Plain = nn.Linear | nn.Embedding
Quantized = nn.QuantizedLinear | nn.QuantizedEmbedding


@dataclass(frozen=True)
class Quantization:
    group_size: int
    bits: int


def quantize_modules(model: nn.Module, quantizations: dict[str, Quantization]) -> None:
    """Replace the named linears and embeddings by quantized ones, whose weights are loaded afterwards.

    Raises ValueError that names the first module that cannot be quantized so.
    """
    modules = dict(model.named_modules())
    quantized = []
    for name, how in quantizations.items():
        module = modules.get(name)
        if not isinstance(module, Plain):
            raise ValueError(f"only linears and embeddings can be quantized, and {name} is neither")
        try:
            quantized.append((name, module.to_quantized(how.group_size, how.bits)))
        except (ValueError, TypeError) as error:  # TypeError for an integer that is too large for C
            raise ValueError(
                f"{name} cannot be quantized with {how.bits} bits in groups of {how.group_size}: "
                f"{one_line(error)}"
            ) from None
    model.update_modules(tree_unflatten(quantized))


def dequantize(model: nn.Module) -> None:
    """Replace quantized linears and embeddings by plain ones."""
    plain = []
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            plain.append((name, plain_module(module, dense_weight_OI(module))))
    model.update_modules(tree_unflatten(plain))


def num_quantized_weights(model: nn.Module) -> int:
    """How many weights are quantized, in all modules together."""
    modules = (module for _, module in model.named_modules() if isinstance(module, Quantized))
    return sum(module.weight.size * 32 // module.bits for module in modules)


def plain_module(module: Plain | Quantized, weight_OI: mx.array) -> Plain:
    """A plain linear or embedding with this weight, and with the module's bias if it has one."""
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        embedding = nn.Embedding(1, 1)
        embedding.weight = weight_OI
        return embedding
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = weight_OI
    if "bias" in module:
        linear.bias = module.bias
    return linear
