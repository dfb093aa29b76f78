"""The sizes of a model from its configuration alone.

MLX's arrays are lazy: a model is made, measured and dropped, and none of its arrays is computed. It has one
block, and then two: the difference is what each further block adds.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ..config import LoRAConfig, ModelConfig
from ..lora import add_lora
from ..model import CausalLM
from .memory_sizes import Sizes, sizes_of

END = 2**31  # of an axis: MLX counts along it in 32 bits


def described_sizes(
    config: ModelConfig, dtype: mx.Dtype, group_size: int = 0, bits: int = 0, lora: LoRAConfig | None = None
) -> Sizes:
    """`sizes_of` the model with its adapter; all linears and the embedding quantized where bits are given.

    Raises ValueError for an axis that is too long, for a quantization that MLX does not have, and where the
    adapter does not fit the model.
    """
    require_axes(config)
    one, two = (sizes_of(described(config, num, dtype, group_size, bits, lora)) for num in (1, 2))
    more = config.num_hidden_layers - 1
    weights = one.weights + more * (two.weights - one.weights)
    trained = one.trained + more * (two.trained - one.trained)
    return replace(one, config=config, weights=weights, trained=trained)


def described(
    config: ModelConfig,
    num_blocks: int,
    dtype: mx.Dtype,
    group_size: int,
    bits: int,
    lora: LoRAConfig | None,
) -> CausalLM:
    """A model of so many blocks; none of its arrays is computed."""
    model = CausalLM(replace(config, num_hidden_layers=num_blocks))
    model.set_dtype(dtype)
    if bits:
        try:
            nn.quantize(model, group_size, bits)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the model cannot be quantized with {bits} bits in groups of {group_size}: {error}"
            ) from None
    add_lora(model, lora or LoRAConfig())
    return model


def require_axes(config: ModelConfig) -> None:
    """ValueError that names an axis of a weight that MLX could not index."""
    axes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    for heads in ("num_attention_heads", "num_key_value_heads"):
        axes[f"{heads} * head_dim"] = getattr(config, heads) * config.head_dim
    for name, size in axes.items():
        if size >= END:
            raise ValueError(f"{name} must be less than {END}, got {size}")
