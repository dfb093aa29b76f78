"""Read a GGUF file's metadata into a ModelConfig; a key that would change the model's formulas is an error.

Source: llama.cpp's names of the keys (`llama-arch.cpp`), and what its conversion script writes to them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from ...config import ModelConfig, RopeScaling
from ...model import rope_frequencies
from .gguf_file import quote

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral is stored as llama
KNOWN = {  # keys, after the architecture's name, that are read here or do not change the model
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
NEUTRAL: dict[str, Any] = {  # keys that are allowed only with this value, which changes nothing
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
# Relative distance of stored RoPE factors from Llama 3's rule; float32 alone gives 3e-7 (measured).
FACTOR_TOLERANCE = 1e-5


def config_from_metadata(
    metadata: dict[str, Any], tensor_names: Collection[str], rope_factors_P: np.ndarray | None = None
) -> ModelConfig:
    """The configuration; KeyError for a missing key, ValueError for a value that is not supported."""
    architecture = require_supported(metadata)
    a, tokens = f"{architecture}.", metadata["tokenizer.ggml.tokens"]
    if not isinstance(tokens, list):
        raise ValueError(f"tokenizer.ggml.tokens must be an array, got {quote(tokens)}")
    width = positive_int(metadata, a + "embedding_length")
    num_heads = positive_int(metadata, a + "attention.head_count")
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
    require_consistent(metadata, a, config)
    return replace(config, rope_scaling=rope_scaling(metadata, a, config, rope_factors_P))


def require_consistent(metadata: dict[str, Any], a: str, config: ModelConfig) -> None:
    """ValueError for a size that the file gives twice, and not the same."""
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(a + name, config.head_dim) != config.head_dim:
            raise ValueError(
                f"{a}{name} must be the head dimension {config.head_dim}, got {metadata[a + name]}"
            )
    if metadata.get(a + "vocab_size", config.vocab_size) != config.vocab_size:
        raise ValueError(
            f"{a}vocab_size must be the number of tokens, {config.vocab_size}, "
            f"got {quote(metadata[a + 'vocab_size'])}"
        )


def require_supported(metadata: dict[str, Any]) -> str:
    """The architecture; ValueError if it, or one of its keys, is not supported."""
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"the architecture must be one of llama, qwen2, qwen3, got {quote(architecture)}")
    if metadata.get("general.type", "model") != "model":
        raise ValueError(f"general.type must be model, got {quote(metadata['general.type'])}")
    if metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(
            f"the model must be in one file, got one of {quote(metadata['split.count'])} parts: "
            f"merge them first"
        )
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name != key and name not in KNOWN and (name not in NEUTRAL or value != NEUTRAL[name]):
            raise ValueError(f"{quote(key)} is not supported, got {quote(value)}")
    return str(architecture)


def sliding_window(metadata: dict[str, Any], architecture: str) -> int | None:
    """Mistral's window, of all layers; 0 means none. Qwen's is refused: only some layers have it."""
    key = f"{architecture}.attention.sliding_window"
    if metadata.get(key, 0) == 0:
        return None
    if architecture != "llama":
        raise ValueError(f"{key} is not supported, got {quote(metadata[key])}")
    return positive_int(metadata, key)


def positive_int(metadata: dict[str, Any], key: str) -> int:
    value = metadata[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a whole number and at least 1, got {quote(value)}")
    return value


def rope_scaling(
    metadata: dict[str, Any], a: str, config: ModelConfig, factors_P: np.ndarray | None
) -> RopeScaling | None:
    """`linear` from the metadata, which may lack the type; `llama3` from the stored factors."""
    kind, factor = metadata.get(a + "rope.scaling.type", "linear"), metadata.get(a + "rope.scaling.factor", 1)
    if kind not in ("none", "linear"):
        raise ValueError(f"{a}rope.scaling.type must be none or linear, got {quote(kind)}")
    linear = None if factor in (0, 1) else RopeScaling("linear", factor)
    if linear and (kind == "none" or factors_P is not None):
        raise ValueError(f"{a}rope.scaling.factor contradicts the rest of the file, got {quote(factor)}")
    return linear if factors_P is None else llama3_scaling(config, factors_P)


def llama3_scaling(config: ModelConfig, factors_P: np.ndarray) -> RopeScaling:
    """The published llama3 rule that gives the stored factors; ValueError if none does.

    llama.cpp stores the divisor of each frequency, not the parameters of the rule. Llama 3.1, 3.2 and 3.3
    differ only in `factor`, and the lowest frequencies are divided by exactly that: it is the maximum.
    """
    if factors_P.shape != (config.head_dim // 2,):
        raise ValueError(
            f"rope_freqs.weight must have {config.head_dim // 2} values, got the shape {factors_P.shape}"
        )
    scaling = RopeScaling("llama3", float(factors_P.max()))
    scaled_P = np.array(rope_frequencies(replace(config, rope_scaling=scaling)))
    expected_P = np.array(rope_frequencies(config)) / scaled_P
    if not np.allclose(factors_P, expected_P, rtol=FACTOR_TOLERANCE):
        raise ValueError(
            f"rope_freqs.weight must follow Llama 3.1's rule with the factor {scaling.factor:g}, "
            f"low 1, high 4 and the original length 8192, and it does not"
        )
    return scaling
