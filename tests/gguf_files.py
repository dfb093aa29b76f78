"""Write GGUF files of three model families, as llama.cpp's conversion script does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from mlx_impl.config import ModelConfig
from reference.model import CausalLM
from tests.tiny_folder import TEMPLATE, permute
from tests.tiny_model import TINY_LLAMA

GGMLType = gguf.GGMLQuantizationType
Arrays = dict[str, np.ndarray]

LLAMA = replace(TINY_LLAMA, rms_norm_eps=2.0**-17)  # GGUF stores it in float32
FAMILIES = {  # name: (architecture, configuration)
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", replace(LLAMA, tie_word_embeddings=True)),
    "llama-with-biases": ("llama", replace(LLAMA, qkv_bias=True)),
    # As in the published models, heads * head_dim is the width.
    "qwen2": ("qwen2", replace(LLAMA, hidden_size=60, qkv_bias=True, tie_word_embeddings=True)),
    "qwen3": ("qwen3", replace(LLAMA, qk_norm=True)),
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_weights(spec: ModelConfig, seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(p.shape) for name, p in CausalLM(spec).named_parameters()}
    weights = {n: (0.3 * rng.standard_normal(s)).astype(np.float32) for n, s in sorted(shapes.items())}
    return weights | {n: 1 + w for n, w in weights.items() if "norm" in n}


def gguf_tensors(architecture: str, spec: ModelConfig, weights: Arrays) -> Arrays:
    """The weights under llama.cpp's names; for llama with the rows of Q and K in llama.cpp's order."""
    tensors = {}
    for name, weight in weights.items():
        heads = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads}
        num_heads = next((heads[part] for part in heads if part in name), 0)
        if architecture == "llama" and num_heads:
            weight = permute(weight.reshape(len(weight), -1), num_heads).reshape(weight.shape)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours + ".", theirs + ".")
        tensors[name] = np.ascontiguousarray(weight)
    return tensors


def model_metadata(architecture: str, spec: ModelConfig) -> dict[str, Any]:
    values = {
        "context_length": 64,
        "block_count": spec.num_hidden_layers,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_attention_heads,
        "attention.head_count_kv": spec.num_key_value_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "rope.freq_base": spec.rope_theta,
        **({"rope.dimension_count": spec.head_dim} if architecture == "llama" else {}),
    }
    return {f"{architecture}.{name}": value for name, value in values.items()}


def byte_level_metadata(vocab_size: int = 61, pre: str = "smollm") -> dict[str, Any]:
    """A vocabulary of three control tokens, one merge and as many letters as fit."""
    special, alphabet = ["<pad>", "<|im_start|>", "<|im_end|>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, "in", "i", "n", *(letter for letter in alphabet if letter not in "in")][:vocab_size]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["i n"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_metadata(vocab_size: int = 61) -> dict[str, Any]:
    """A vocabulary whose scores fall with the token's number: one pair of letters, letters, some bytes."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["in", "\u2581", *letters]
    tokens = ["<unk>", "<s>", "</s>", *pieces, *(f"<0x{byte:02X}>" for byte in range(256))][:vocab_size]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(number) for number in range(len(tokens))],
        "tokenizer.ggml.token_type": ([2, 3, 3] + [1] * len(pieces) + [6] * 256)[:vocab_size],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE.replace("<|im_end|>", "</s>"),
    }


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, GGMLType] | None = None,
) -> Path:
    """Write a file without the keys whose value is None; tensors named in `types` are given as bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add(writer, key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def write_family(
    path: Path,
    family: str = "llama",
    change: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    types: Mapping[str, GGMLType] | None = None,
    spec: ModelConfig | None = None,
) -> Path:
    """The family's tiny model with random weights; `change` and `tensors` replace, or with None remove."""
    architecture, usual = FAMILIES[family]
    spec = spec or usual
    metadata = model_metadata(architecture, spec) | byte_level_metadata(spec.vocab_size) | dict(change or {})
    arrays = gguf_tensors(architecture, spec, random_weights(spec)) | dict(tensors or {})
    kept = {name: array for name, array in arrays.items() if array is not None}
    return write(path, architecture, metadata, kept, types)
