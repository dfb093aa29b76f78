"""Published config.json files give the right ModelConfig; what is not supported is refused by name.

The configurations are the published ones, complete; expected values are typed from the definitions of
transformers' configuration classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.config import ModelConfig, RopeScaling
from mlx_impl.files.formats.hf_config import read_config

Config = dict[str, Any]

LLAMA_2_7B: Config = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
TINY_LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1_8B: Config = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_2_1B: Config = LLAMA_3_1_8B | {
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
SMOLLM2_135M: Config = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
MISTRAL_7B_01: Config = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_7B_03: Config = MISTRAL_7B_01 | {
    "attention_dropout": 0.0,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "transformers_version": "4.42.0.dev0",
    "vocab_size": 32768,
}
MISTRAL_NEMO: Config = MISTRAL_7B_03 | {
    "head_dim": 128,
    "hidden_size": 5120,
    "max_position_embeddings": 128000,
    "num_hidden_layers": 40,
    "vocab_size": 131072,
}
QWEN2_7B: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN2_5_05B: Config = QWEN2_7B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "transformers_version": "4.40.1",
    "use_mrope": False,
    "vocab_size": 151936,
}
QWEN3_06B: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

PUBLISHED: dict[str, tuple[Config, ModelConfig]] = {
    "Llama-2-7b": (LLAMA_2_7B, ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4, False)),
    "TinyLlama-1.1B": (TINY_LLAMA, ModelConfig(32000, 2048, 5632, 22, 32, 4, 64, 1e-5, 1e4, False)),
    "Llama-3.1-8B": (
        LLAMA_3_1_8B,
        ModelConfig(
            *(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, False),
            rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ),
    "Llama-3.2-1B": (
        LLAMA_3_2_1B,
        ModelConfig(
            *(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 5e5, True),
            rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
    ),
    "SmolLM2-135M": (SMOLLM2_135M, ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, True)),
    "Mistral-7B-v0.1": (
        MISTRAL_7B_01,
        ModelConfig(32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e4, False, sliding_window=4096),
    ),
    "Mistral-7B-v0.3": (MISTRAL_7B_03, ModelConfig(32768, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e6, False)),
    "Mistral-Nemo": (MISTRAL_NEMO, ModelConfig(131072, 5120, 14336, 40, 32, 8, 128, 1e-5, 1e6, False)),
    "Qwen2-7B": (
        QWEN2_7B,
        ModelConfig(152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6, False, qkv_bias=True),
    ),
    "Qwen2.5-0.5B": (
        QWEN2_5_05B,
        ModelConfig(151936, 896, 4864, 24, 14, 2, 64, 1e-6, 1e6, True, qkv_bias=True),
    ),
    "Qwen3-0.6B": (
        QWEN3_06B,
        ModelConfig(151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1e6, True, qk_norm=True),
    ),
}
published = pytest.mark.parametrize(("config", "expected"), PUBLISHED.values(), ids=PUBLISHED)


def read(folder: Path, config: Config) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


def respelled(config: Config) -> Config:
    """The configuration as transformers 5 saves it."""
    new = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    rope = config.get("rope_scaling") or {"rope_type": "default"}
    new["rope_parameters"] = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
    new["transformers_version"] = "5.23.0"
    if config["model_type"].startswith("qwen"):
        new["sliding_window"] = None
        new["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    return new


@published
def test_a_published_configuration_is_read(tmp_path: Path, config: Config, expected: ModelConfig) -> None:
    assert read(tmp_path, config) == expected


@published
def test_the_spelling_of_transformers_5_means_the_same(
    tmp_path: Path, config: Config, expected: ModelConfig
) -> None:
    assert read(tmp_path, respelled(config)) == expected


@published
def test_quantization_as_on_mlx_community_does_not_change_the_model(
    tmp_path: Path, config: Config, expected: ModelConfig
) -> None:
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert (
        read(tmp_path, config | {"quantization": quantization, "quantization_config": quantization})
        == expected
    )


ABSENT = object()
ALL, SOME = ["full_attention"] * 28, ["full_attention"] * 20 + ["sliding_attention"] * 8


def changed(config: Config, change: Config) -> Config:
    return {key: value for key, value in (config | change).items() if value is not ABSENT}


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        (LLAMA_2_7B, {"num_key_value_heads": ABSENT}, {"num_key_value_heads": 32}),
        (LLAMA_2_7B, {"num_key_value_heads": None}, {"num_key_value_heads": 32}),
        (LLAMA_2_7B, {"head_dim": None}, {"head_dim": 128}),
        (LLAMA_2_7B, {"head_dim": 160}, {"head_dim": 160}),
        (LLAMA_2_7B, {"tie_word_embeddings": ABSENT}, {"tie_word_embeddings": False}),
        (LLAMA_2_7B, {"pretraining_tp": 2}, {}),  # the matrices in slices: the same sums
        (LLAMA_2_7B, {"rope_parameters": None}, {}),
        (LLAMA_2_7B, {"rope_scaling": {"rope_type": "default"}}, {}),
        (LLAMA_2_7B, {"quantization_config": None, "attention_bias": None, "mlp_bias": None}, {}),
        (
            LLAMA_2_7B,
            {"rope_scaling": {"factor": 2.0, "type": "linear"}},
            {"rope_scaling": RopeScaling("linear", 2.0)},
        ),
        (
            LLAMA_2_7B,
            {"rope_scaling": {"factor": 4, "rope_type": "linear", "type": "linear"}},
            {"rope_scaling": RopeScaling("linear", 4.0)},
        ),
        (
            LLAMA_2_7B,
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0}},
            {"rope_scaling": RopeScaling("linear", 8.0), "rope_theta": 500.0},
        ),
        (MISTRAL_7B_01, {"sliding_window": ABSENT}, {"sliding_window": 4096}),
        (QWEN2_7B, {"use_sliding_window": ABSENT}, {"sliding_window": None}),
        (QWEN2_7B, {"use_sliding_window": True}, {"sliding_window": None}),  # from layer 28 of 28 on
        (QWEN2_7B, {"use_sliding_window": True, "max_window_layers": ABSENT}, {"sliding_window": None}),
        (QWEN2_7B, {"use_sliding_window": True, "max_window_layers": 0}, {"sliding_window": 131072}),
        (
            QWEN3_06B,
            {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
            {"sliding_window": 512},
        ),
        (
            QWEN3_06B,
            {"use_sliding_window": True, "sliding_window": 512, "layer_types": ["sliding_attention"] * 28},
            {"sliding_window": 512},
        ),
        (
            QWEN2_7B,
            {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ALL},
            {"sliding_window": None},
        ),
        (QWEN3_06B, {"head_dim": ABSENT}, {"head_dim": 128}),  # and not 1024 / 16
    ],
)
def test_missing_and_optional_keys_are_read_as_transformers_reads_them(
    tmp_path: Path, config: Config, change: Config, expected: dict[str, Any]
) -> None:
    found = read(tmp_path, changed(config, change))
    whole = next(model for raw, model in PUBLISHED.values() if raw is config)
    assert found == ModelConfig(**(vars(whole) | expected))


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        # known keys with unsupported values
        (LLAMA_2_7B, {"model_type": "gemma2"}, "model_type.*'gemma2'"),
        (LLAMA_2_7B, {"model_type": "llama4"}, "model_type.*'llama4'"),
        (LLAMA_2_7B, {"model_type": ABSENT}, "model_type"),
        (LLAMA_2_7B, {"model_type": ["llama"]}, "model_type"),
        (LLAMA_2_7B, {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act.*'gelu_pytorch_tanh'"),
        (LLAMA_2_7B, {"attention_bias": True}, "attention_bias.*True"),
        (QWEN3_06B, {"attention_bias": True}, "attention_bias.*True"),
        (LLAMA_2_7B, {"mlp_bias": True}, "mlp_bias.*True"),
        (LLAMA_2_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor.*0.5"),
        (SMOLLM2_135M, {"rope_interleaved": True}, "rope_interleaved"),
        (SMOLLM2_135M, {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),  # SmolLM3's
        # rope of other kinds, in either spelling
        (LLAMA_2_7B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type.*dynamic"),
        (QWEN2_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type.*yarn"),
        (QWEN3_06B, {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type.*longrope"),
        (QWEN3_06B, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type.*yarn"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_type"),
        (LLAMA_2_7B, {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (LLAMA_2_7B, {"rope_scaling": {"factor": 2.0}}, "rope"),
        (LLAMA_3_1_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA_2_7B, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attn": 1.3}}, "attn"),
        (QWEN2_7B, {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24]}}, "mrope_section"),
        (
            LLAMA_2_7B,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        (QWEN2_7B, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (LLAMA_2_7B, {"rope_scaling": 2.0}, "rope_scaling"),
        (LLAMA_2_7B, {"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "type"),
        (LLAMA_2_7B, {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        # windows in some layers, or in families without windows
        (QWEN2_7B, {"use_sliding_window": True, "max_window_layers": 20}, "sliding window|sliding_window"),
        (QWEN2_7B, {"use_sliding_window": True, "layer_types": SOME}, "sliding window|layer_types"),
        (QWEN3_06B, {"layer_types": ["chunked_attention"] * 28}, "layer_types|chunked_attention"),
        (
            QWEN3_06B,
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 28},
            "layer_types|chunked_attention",
        ),
        (QWEN2_7B, {"use_sliding_window": True, "layer_types": 5}, "layer_types"),
        (QWEN2_7B, {"use_sliding_window": True, "layer_types": ALL[:-1]}, "layer_types"),
        (QWEN2_7B, {"use_sliding_window": True, "max_window_layers": "28"}, "max_window_layers"),
        (QWEN2_7B, {"use_sliding_window": "no"}, "use_sliding_window"),
        (LLAMA_2_7B, {"sliding_window": 4096}, "sliding_window"),
        (MISTRAL_7B_01, {"sliding_window": 0}, "sliding_window"),
        (MISTRAL_7B_01, {"sliding_window": "4096"}, "sliding_window"),
        (MISTRAL_7B_01, {"sliding_window": True}, "sliding_window"),
        (
            MISTRAL_7B_01,
            {"layer_types": ["sliding_attention", "full_attention"] * 16},
            "sliding window|layer_types",
        ),
        # Mistral's window is in all layers: layer_types must not say otherwise
        (MISTRAL_7B_01, {"layer_types": ["full_attention"] * 32}, "sliding window|layer_types"),
        (MISTRAL_7B_03, {"layer_types": ["sliding_attention"] * 32}, "sliding window|layer_types"),
        # quantization by other methods
        (LLAMA_2_7B, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        (MISTRAL_7B_01, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        (
            LLAMA_3_1_8B,
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes",
        ),
        (QWEN3_06B, {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        (QWEN3_06B, {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "mxfp4"),
        # unknown keys
        (QWEN3_06B, {"num_experts": 128}, "num_experts.*128"),
        (MISTRAL_7B_01, {"num_local_experts": 8}, "num_local_experts"),
        (LLAMA_2_7B, {"logit_scale": 0.0625}, "logit_scale.*0.0625"),
        (LLAMA_2_7B, {"logit_scale": 0}, "logit_scale.*0"),  # 0 does not mean off
        (LLAMA_2_7B, {"residual_multiplier": 0.22}, "residual_multiplier"),
        (LLAMA_2_7B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (LLAMA_2_7B, {"use_qk_norm": True}, "use_qk_norm"),
        (LLAMA_2_7B, {"clip_qkv": 8}, "clip_qkv"),
        (QWEN2_7B, {"use_mrope": True}, "use_mrope"),
        (LLAMA_2_7B, {"a key of tomorrow": "on"}, "a key of tomorrow"),
        (LLAMA_2_7B, {"vision_config": {"depth": 2}}, "vision_config"),
        # values of a wrong type, or out of range
        (LLAMA_2_7B, {"hidden_size": "4096"}, "hidden_size"),
        (LLAMA_2_7B, {"hidden_size": 4096.0}, "hidden_size"),
        (LLAMA_2_7B, {"num_attention_heads": 0}, "num_attention_heads"),
        (LLAMA_2_7B, {"num_key_value_heads": 0}, "num_key_value_heads"),
        (LLAMA_2_7B, {"num_key_value_heads": -8}, "num_key_value_heads"),
        (LLAMA_2_7B, {"num_hidden_layers": 1.5}, "num_hidden_layers"),
        (LLAMA_2_7B, {"vocab_size": None}, "vocab_size"),
        (LLAMA_2_7B, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (LLAMA_2_7B, {"rope_theta": float("inf")}, "rope_theta"),
        (LLAMA_2_7B, {"rope_theta": [1e4]}, "rope_theta"),
        (LLAMA_2_7B, {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        (LLAMA_2_7B, {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        (LLAMA_2_7B, {"hidden_size": 4100}, "head_dim|hidden_size"),  # 32 heads of 128.125
    ],
)
def test_what_would_be_another_model_is_refused_by_name(
    tmp_path: Path, config: Config, change: Config, named: str
) -> None:
    """The error is one line that begins with the file's path."""
    with pytest.raises(ValueError, match=named) as caught:
        read(tmp_path, changed(config, change))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
@pytest.mark.parametrize(
    "config", [LLAMA_2_7B, MISTRAL_7B_01, QWEN2_7B, QWEN3_06B], ids=lambda c: c["model_type"]
)
def test_a_missing_size_is_named(tmp_path: Path, config: Config, key: str) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: the key '{key}' is missing"):
        read(tmp_path, changed(config, {key: ABSENT}))


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": None, "problem_type": None, "pad_token_id": None, "a key of tomorrow": None},
        {"use_qk_norm": False, "num_experts": None, "tie_encoder_decoder": False, "pruned_heads": {}},
        {"bos_token_id": 5, "eos_token_id": [5, 6], "max_position_embeddings": 7, "use_cache": False},
        {"initializer_range": 0.5, "torch_dtype": "float32", "architectures": None},
        {"unsloth_fixed": True, "unsloth_version": "2025.1", "_attn_implementation_autoset": True},
        {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "return_dict": True, "top_k": 50},
        {"temperature": 0.6, "top_p": 0.9, "chunk_size_feed_forward": 0, "max_length": 20},
    ],
)
def test_bookkeeping_keys_and_options_that_are_off_change_nothing(tmp_path: Path, change: Config) -> None:
    assert read(tmp_path, LLAMA_2_7B | change) == PUBLISHED["Llama-2-7b"][1]
