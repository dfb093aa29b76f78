"""The keys of `config.json`: read by `hf_config.py`, known to be harmless, or refused unless they are off."""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Keys that change the model's formulas, with the only value that is computed here (null means the same).
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
    *(
        "_name_or_path",
        "name_or_path",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "is_llama_config",
    ),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "return_dict", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "task_specific_params"),
    *("is_decoder", "problem_type", "max_length", "min_length", "do_sample", "num_beams", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_return_sequences"),
    *("num_beam_groups", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("early_stopping", "torchscript", "use_bfloat16", "keys_to_ignore_at_inference", "neftune_noise_alpha"),
}
SAME = {("hidden_act", "swish")}  # another name of the value that is computed here
OFF: tuple[object, ...] = (None, False, {}, [], "none")


def is_off(value: object) -> bool:
    """Whether a value turns its option off. A number never does: a factor of 0 is not a missing factor."""
    return any(type(value) is type(off) and value == off for off in OFF)


def require_known(raw: dict[str, Any]) -> None:
    """ValueError that names a key or value that would change the model."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
    for key in sorted(raw.keys() - READ - HARMLESS):
        if key == "attention_bias" and family == "qwen2":
            continue  # in this family q, k and v always have biases
        if (key, str(raw[key])) in SAME or (key.endswith("_pdrop") and raw[key] == 0):
            continue
        if key in REQUIRED_VALUES and raw[key] not in (REQUIRED_VALUES[key], None):
            raise ValueError(f"{key} must be {REQUIRED_VALUES[key]!r}, got {raw[key]!r}")
        if key not in REQUIRED_VALUES and not is_off(raw[key]):
            raise ValueError(f"{key} is not supported, got {raw[key]!r}")
