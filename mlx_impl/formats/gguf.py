"""A GGUF file of the Llama architecture -> configuration, weights under Hugging Face's names, metadata.

The `gguf` package reads and dequantizes it in NumPy; `mx.load` would crash the process on a damaged file.
Source: llama.cpp's GGUF specification and its conversion script, which reorders the rows of Q and K.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..config import ModelConfig

HUGGING_FACE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray], dict[str, Any]]:
    """float32 weights, dequantized; ValueError in one sentence where the file cannot be used."""
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        config = config_from_metadata(metadata, {tensor.name for tensor in reader.tensors})
        weights = dict(read_tensor(tensor, config) for tensor in reader.tensors)
    except ValueError as error:
        raise ValueError(f"{path}: not a usable GGUF file: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path}: not a usable GGUF file: it lacks {error}") from None
    except Exception as error:  # the package raises whatever the damaged bytes lead it to
        raise ValueError(f"{path}: not a readable GGUF file: {type(error).__name__}") from None
    return config, weights, metadata


def config_from_metadata(metadata: dict[str, Any], tensor_names: set[str]) -> ModelConfig:
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"the architecture must be llama, got {architecture!r}")
    for name in ("llama.rope.scaling.type", "llama.expert_count"):
        if metadata.get(name, "none") not in ("none", 0):
            raise ValueError(f"{name} is not supported, got {metadata[name]!r}")
    width, num_heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return ModelConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", num_heads),
        head_dim=metadata.get("llama.rope.dimension_count", width // num_heads),
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in tensor_names,
    )


def read_tensor(tensor: gguf.ReaderTensor, config: ModelConfig) -> tuple[str, np.ndarray]:
    weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if tensor.name.endswith("attn_q.weight"):
        weight = unpermute(weight, config.num_attention_heads)
    elif tensor.name.endswith("attn_k.weight"):
        weight = unpermute(weight, config.num_key_value_heads)
    return hugging_face_name(tensor.name), weight


def unpermute(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows from llama.cpp's order, where rope's pairs are neighbours, to halves that are K/2 apart."""
    num_out, num_in = weight_OI.shape
    pairs = weight_OI.reshape(num_heads, num_out // num_heads // 2, 2, num_in)
    return pairs.swapaxes(1, 2).reshape(num_out, num_in)


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; an unknown name stays."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, stem = stem.split(".", 2)
        return f"model.layers.{number}.{HUGGING_FACE_NAMES.get(stem, stem)}.{suffix}"
    return f"{HUGGING_FACE_NAMES.get(stem, stem)}.{suffix}"
