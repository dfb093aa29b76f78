"""`config.json` of a Hugging Face folder -> ModelConfig, for Llama, Mistral, Qwen2 and Qwen3.

Source: transformers' configuration classes, in the spelling up to version 4 (rope_theta, rope_scaling) and
that of version 5 (rope_parameters). Every key is read, known to change nothing, or refused by name unless it
is off: a model that is nearly right is worse than none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import ModelConfig, RopeScaling, require_choice, require_number
from ..files import read_json_object
from .mlx_quantization import require_supported

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
QWEN3_HEAD_DIM, MISTRAL_WINDOW = 128, 4096  # what transformers takes where the key is absent

# Keys that change the mathematics, with the only value that this model computes (null means the same).
REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}
READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("quantization", "quantization_config"),
}
HARMLESS = {
    *("architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "mlx_version",
    ),
    *("max_position_embeddings", "original_max_position_embeddings", "pretraining_tp", "auto_map"),
    *("_name_or_path", "name_or_path", "_attn_implementation_autoset", "is_llama_config"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "return_dict", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "task_specific_params"),
    *("is_decoder", "problem_type", "max_length", "min_length", "do_sample", "num_beams", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_return_sequences"),
    *("num_beam_groups", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("early_stopping", "torchscript", "use_bfloat16", "keys_to_ignore_at_inference", "neftune_noise_alpha"),
}
OFF: tuple[object, ...] = (None, False, {}, [], "none")
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_config(folder: Path) -> ModelConfig:
    """Raises ValueError that names the key that is missing, unknown or has another value than we compute."""
    path = folder / "config.json"
    raw = read_json_object(path)
    try:
        require_known(raw)
        require_supported(raw)
        return to_config(raw)
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def require_known(raw: dict[str, Any]) -> None:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
    for key in sorted(raw.keys() - READ - HARMLESS):
        allowed = (REQUIRED_VALUES[key], None) if key in REQUIRED_VALUES else OFF
        if key == "attention_bias" and family == "qwen2":
            continue  # what it would say, of q, k and v, is so in this family anyway
        if raw[key] not in allowed:
            wanted = f"must be {allowed[0]!r}" if key in REQUIRED_VALUES else "is not supported"
            raise ValueError(f"{key} {wanted}, got {raw[key]!r}")


def to_config(raw: dict[str, Any]) -> ModelConfig:
    family, num_heads = raw["model_type"], raw["num_attention_heads"]
    theta, scaling = read_rope(raw)
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=read_kv_heads(raw),
        head_dim=read_head_dim(raw),
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=theta,
        tie_word_embeddings=given(raw, "tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
        sliding_window=read_window(raw),
    )


def given(raw: dict[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default where it is absent or null."""
    return default if raw.get(key) is None else raw[key]


def read_kv_heads(raw: dict[str, Any]) -> Any:
    """As many as heads where a Llama's configuration is silent; the other families' must say."""
    if raw["model_type"] == "llama":
        return given(raw, "num_key_value_heads", raw["num_attention_heads"])
    return raw["num_key_value_heads"]


def read_head_dim(raw: dict[str, Any]) -> Any:
    if raw.get("head_dim") is not None:
        return raw["head_dim"]
    if raw["model_type"] == "qwen3":
        return QWEN3_HEAD_DIM
    try:
        return raw["hidden_size"] // raw["num_attention_heads"]
    except (TypeError, ZeroDivisionError):
        raise ValueError("hidden_size and num_attention_heads must be numbers of at least 1") from None


def read_rope(raw: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """The base and the stretching, in either spelling."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = given(raw, key, {})
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be an object, got {value!r}")
        rope |= value
    theta = given(raw, "rope_theta", rope.pop("rope_theta", 10000.0))
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    require_choice("rope_type", kind, tuple(ROPE_KEYS))
    for key in sorted(rope.keys() ^ ROPE_KEYS[kind]):
        if key not in ROPE_KEYS[kind] and (rope[key] in OFF or REQUIRED_VALUES.get(key) == rope[key]):
            continue
        raise ValueError(f"the rope_type {kind} has the keys {sorted(ROPE_KEYS[kind])}, got {sorted(rope)}")
    if kind == "default":
        return theta, None
    return theta, RopeScaling(kind, **{key: rope[key] for key in ROPE_KEYS[kind]})


def read_window(raw: dict[str, Any]) -> Any:
    """The sliding window of all layers, None for none; layers of both kinds are refused."""
    family, window = raw["model_type"], raw.get("sliding_window")
    if family == "mistral":
        window = raw.get("sliding_window", MISTRAL_WINDOW)
    elif family == "llama" and window is not None:
        raise ValueError(f"sliding_window is not supported in this family, got {window!r}")
    elif not raw.get("use_sliding_window"):
        return None
    if window is None:
        return None
    first = given(raw, "max_window_layers", 0) if family.startswith("qwen") else 0
    kinds = raw.get("layer_types")
    if kinds is None:
        require_number("max_window_layers", first, int, may_be_zero=True)
        kinds = ["full_attention"] * (first > 0) + ["sliding_attention"] * (first < raw["num_hidden_layers"])
    if not isinstance(kinds, list) or not all(kind == kinds[0] for kind in kinds):
        raise ValueError("sliding_window must be that of all layers or of none, and is that of some")
    return window if "sliding_attention" in kinds else None
