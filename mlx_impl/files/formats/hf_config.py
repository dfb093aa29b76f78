"""`config.json` of a Hugging Face folder -> ModelConfig, for Llama, Mistral, Qwen2 and Qwen3.

Source: transformers' configuration classes, in the spelling up to version 4 (rope_theta, rope_scaling) and
that of version 5 (rope_parameters). A key that asks for what is not computed here is refused by its name
(`hf_keys.py`): a model that is nearly right is worse than none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config import ModelConfig, RopeScaling, require_choice, require_number
from ...disk.files import read_json_object
from .hf_keys import REQUIRED_VALUES, is_off, require_known
from .mlx_quantization import require_supported

# transformers' defaults for missing keys.
QWEN3_HEAD_DIM, DEFAULT_WINDOW, QWEN_FIRST_WINDOW = 128, 4096, 28
LAYER_TYPES = ("full_attention", "sliding_attention")

ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration; ValueError that names a key that is missing, unknown or not supported."""
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
        tie_word_embeddings=value_or(raw, "tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
        sliding_window=read_window(raw),
    )


def value_or(raw: dict[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default if it is missing or null."""
    return default if raw.get(key) is None else raw[key]


def read_kv_heads(raw: dict[str, Any]) -> Any:
    """The number of key/value heads. Llama's default is the number of heads; other families must give it."""
    if raw["model_type"] == "llama":
        return value_or(raw, "num_key_value_heads", raw["num_attention_heads"])
    return raw["num_key_value_heads"]


def read_head_dim(raw: dict[str, Any]) -> Any:
    if raw.get("head_dim") is not None:
        return raw["head_dim"]
    if raw["model_type"] == "qwen3":
        return QWEN3_HEAD_DIM
    for key in ("hidden_size", "num_attention_heads"):
        require_number(key, raw[key], int)
    head_dim, rest = divmod(raw["hidden_size"], raw["num_attention_heads"])
    if rest:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
            f"got {raw['hidden_size']} and {raw['num_attention_heads']}"
        )
    return head_dim


def read_rope(raw: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """The base theta and the scaling, from the keys of transformers 4 or 5."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = value_or(raw, key, {})
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be an object, got {value!r}")
        rope |= value
    theta = value_or(raw, "rope_theta", rope.pop("rope_theta", 10000.0))
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    require_choice("rope_type", kind, tuple(ROPE_KEYS))
    for key in sorted(rope.keys() ^ ROPE_KEYS[kind]):
        if key not in ROPE_KEYS[kind] and (is_off(rope[key]) or REQUIRED_VALUES.get(key) == rope[key]):
            continue
        raise ValueError(f"rope_type {kind} takes the keys {sorted(ROPE_KEYS[kind])}, got {sorted(rope)}")
    if kind == "default":
        return theta, None
    return theta, RopeScaling(kind, **{key: rope[key] for key in ROPE_KEYS[kind]})


def read_window(raw: dict[str, Any]) -> Any:
    """The sliding window of all layers, or None; ValueError if only some layers have one."""
    window, kinds = family_window(raw), raw.get("layer_types")
    require_number("num_hidden_layers", raw["num_hidden_layers"], int)
    is_qwen = raw["model_type"].startswith("qwen")
    if kinds is None:
        first = value_or(raw, "max_window_layers", QWEN_FIRST_WINDOW) if is_qwen else 0
        require_number("max_window_layers", first, int, may_be_zero=True)
        kinds = ["full_attention"] * (first > 0) + ["sliding_attention"] * (first < raw["num_hidden_layers"])
    elif not isinstance(kinds, list) or len(kinds) != raw["num_hidden_layers"]:
        raise ValueError(f"layer_types must be a list with one entry per layer, got {kinds!r}")
    elif not all(kind in LAYER_TYPES for kind in kinds):
        raise ValueError(f"layer_types must all be {' or '.join(LAYER_TYPES)}, got {kinds!r}")
    elif not is_qwen or window is None:
        window_of_all = "full_attention" if window is None else "sliding_attention"
        if any(kind != window_of_all for kind in kinds):
            raise ValueError(f"layer_types must agree with the sliding_window {window}, got {kinds!r}")
        return window
    if window is not None and len(set(kinds)) > 1:
        raise ValueError("either all layers or no layer must have a sliding window, got some of both")
    return window if kinds[0] == "sliding_attention" else None


def family_window(raw: dict[str, Any]) -> Any:
    """The window of those layers that have one, by the rules of the model's family; None if it is off."""
    family, window = raw["model_type"], raw.get("sliding_window")
    if family == "mistral":
        return raw.get("sliding_window", DEFAULT_WINDOW)
    if family == "llama":
        if window is not None:
            raise ValueError(f"sliding_window is not supported for llama, got {window!r}")
        return None
    use = raw.get("use_sliding_window")
    if use not in (None, True, False):
        raise ValueError(f"use_sliding_window must be true or false, got {use!r}")
    return raw.get("sliding_window", DEFAULT_WINDOW) if use else None
