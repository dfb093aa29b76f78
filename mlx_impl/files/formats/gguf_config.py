"""A GGUF file's metadata -> ModelConfig; a key that asks for what the model does not compute is an error.

Source: llama.cpp's names of the keys (`llama-arch.cpp`), and what its conversion script writes to them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from ...config import ModelConfig, RopeScaling
from ...model import rope_frequencies
from .gguf_file import shown

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral is stored as llama
HANDLED = {  # keys below the architecture's name that are read here, or say nothing about the mathematics
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
NEUTRAL: dict[str, Any] = {  # keys that may be there as long as they change nothing
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "pooling_type": 0,
    "residual_scale": 1,
    "rope.scaling.attn_factor": 1,
    "use_parallel_residual": False,
}
# How closely stored factors must follow Llama 3's rule: in float32, as they are computed, 3e-7 (measured).
FACTOR_TOLERANCE = 1e-5


def config_from_metadata(
    metadata: dict[str, Any], tensor_names: Collection[str], rope_factors_P: np.ndarray | None = None
) -> ModelConfig:
    """KeyError where a key is missing, ValueError in one sentence where a value cannot be served."""
    architecture = require_served(metadata)
    a, tokens = f"{architecture}.", metadata["tokenizer.ggml.tokens"]
    if not isinstance(tokens, list):
        raise ValueError(f"tokenizer.ggml.tokens must be an array, got {shown(tokens)}")
    width, num_heads = whole(metadata, a + "embedding_length"), whole(metadata, a + "attention.head_count")
    config = ModelConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=metadata[a + "feed_forward_length"],
        num_hidden_layers=metadata[a + "block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=metadata.get(a + "attention.head_count_kv", num_heads),
        head_dim=metadata.get(a + "attention.key_length", width // num_heads),
        rms_norm_eps=metadata[a + "attention.layer_norm_rms_epsilon"],
        rope_theta=metadata.get(a + "rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in tensor_names,
        qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in tensor_names,
        qk_norm=architecture == "qwen3",
        sliding_window=sliding_window(metadata, architecture),
    )
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(a + name, config.head_dim) != config.head_dim:
            raise ValueError(
                f"{a}{name} must be the head dimension {config.head_dim}, got {metadata[a + name]}"
            )
    if metadata.get(a + "vocab_size", config.vocab_size) != config.vocab_size:
        raise ValueError(
            f"{a}vocab_size must be the number of tokens, {config.vocab_size}, "
            f"got {shown(metadata[a + 'vocab_size'])}"
        )
    return replace(config, rope_scaling=rope_scaling(metadata, a, config, rope_factors_P))


def require_served(metadata: dict[str, Any]) -> str:
    """The architecture; ValueError where it, or a key of it, asks for what the model does not compute."""
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"the architecture must be one of llama, qwen2, qwen3, got {shown(architecture)}")
    if metadata.get("general.type", "model") != "model":
        raise ValueError(f"general.type must be model, got {shown(metadata['general.type'])}")
    if metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(
            f"it is one of {shown(metadata['split.count'])} parts: merge them into one file first"
        )
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name != key and name not in HANDLED and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise ValueError(f"{shown(key)} is not supported, got {shown(value)}")
    return str(architecture)


def sliding_window(metadata: dict[str, Any], architecture: str) -> int | None:
    """Mistral's, in all layers; 0 stands for none. Qwen's would be that of some layers only."""
    key = f"{architecture}.attention.sliding_window"
    if metadata.get(key, 0) == 0:
        return None
    if architecture != "llama":
        raise ValueError(f"{key} is not supported, got {shown(metadata[key])}")
    return whole(metadata, key)


def whole(metadata: dict[str, Any], key: str) -> int:
    value = metadata[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a whole number and at least 1, got {shown(value)}")
    return value


def rope_scaling(
    metadata: dict[str, Any], a: str, config: ModelConfig, factors_P: np.ndarray | None
) -> RopeScaling | None:
    """`linear` from the metadata, also where it has only the factor; `llama3` from the stored factors."""
    kind, factor = metadata.get(a + "rope.scaling.type", "linear"), metadata.get(a + "rope.scaling.factor", 1)
    if kind not in ("none", "linear"):
        raise ValueError(f"{a}rope.scaling.type must be none or linear, got {shown(kind)}")
    linear = None if factor in (0, 1) else RopeScaling("linear", factor)
    if linear and (kind == "none" or factors_P is not None):
        raise ValueError(f"{a}rope.scaling.factor contradicts the rest of the file, got {shown(factor)}")
    return linear if factors_P is None else llama3_scaling(config, factors_P)


def llama3_scaling(config: ModelConfig, factors_P: np.ndarray) -> RopeScaling:
    """The llama3 rule that the stored factors follow, where it is one that was published.

    llama.cpp stores what each frequency was divided by, and not the rule's parameters. Llama 3.1, 3.2 and 3.3
    differ in the factor only, and the lowest frequencies are divided by the whole of it.
    """
    if factors_P.shape != (config.head_dim // 2,):
        raise ValueError(
            f"rope_freqs.weight must have {config.head_dim // 2} values, got the shape {factors_P.shape}"
        )
    scaling = RopeScaling("llama3", float(factors_P.max()))
    stretched_P = np.array(rope_frequencies(replace(config, rope_scaling=scaling)))
    expected_P = np.array(rope_frequencies(config)) / stretched_P
    if not np.allclose(factors_P, expected_P, rtol=FACTOR_TOLERANCE):
        raise ValueError(
            f"rope_freqs.weight must follow Llama 3.1's rule with the factor {scaling.factor:g}, "
            f"low 1, high 4 and the original length 8192, and it does not"
        )
    return scaling
