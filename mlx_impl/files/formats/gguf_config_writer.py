"""Write a ModelConfig as a GGUF file's metadata: the inverse of `gguf_config.py`.

Source: llama.cpp's names of the keys, and what its conversion script writes to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...config import ModelConfig
from ...model import rope_frequencies


def architecture_of(config: ModelConfig) -> str:
    """llama, qwen2 or qwen3; ValueError for a model that llama.cpp has no architecture for."""
    if config.qk_norm and config.qkv_bias:
        raise ValueError("a model with norms and biases of its queries cannot be written to a GGUF file")
    architecture = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if architecture != "llama" and config.sliding_window is not None:
        raise ValueError(
            f"a sliding window of {architecture} cannot be written to a GGUF file, "
            f"got {config.sliding_window} tokens"
        )
    if architecture != "llama" and rope_factors(config) is not None:
        raise ValueError(f"rope scaling of type llama3 cannot be written to a GGUF file of {architecture}")
    heads, width = config.num_attention_heads * config.head_dim, config.hidden_size
    if architecture == "qwen2" and heads != width:  # llama.cpp takes the one for the other
        raise ValueError(
            f"num_attention_heads * head_dim of qwen2 must be hidden_size to be written to a GGUF file, "
            f"got {heads} and {width}"
        )
    return architecture


def metadata_of_config(config: ModelConfig, context_length: int) -> dict[str, Any]:
    """The architecture and its keys. The factors of `llama3` scaling are a tensor: `rope_factors`."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": context_length,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    scaling, architecture = config.rope_scaling, architecture_of(config)
    if scaling is not None and scaling.rope_type == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    keys = {f"{architecture}.{name}": value for name, value in values.items()}
    return {"general.architecture": architecture, "general.type": "model", **keys}


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """The divisor of each rotation frequency, (K/2,), of `llama3` scaling; None for another or none."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    K = config.head_dim
    plain_P = [config.rope_theta ** (-k / K) for k in range(0, K, 2)]
    return (np.array(plain_P) / np.array(rope_frequencies(config))).astype(np.float32)
