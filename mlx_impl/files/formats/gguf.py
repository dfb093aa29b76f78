"""Read a GGUF file of the Llama family: configuration, weights under Hugging Face's names, metadata.

The `gguf` package dequantizes, in NumPy. Source: llama.cpp's tensor names and its conversion script. For the
architecture `llama` the script reorders the rows of Q and K, since llama.cpp rotates neighbouring pairs
(interleaved RoPE); Qwen's rows keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ...config import ModelConfig
from ...disk.files import one_line
from ...machine.memory_limits import TooLittleMemory, require_bytes
from .gguf_config import config_from_metadata
from .gguf_file import StoredTensor, quote, read_container

HUGGING_FACE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PART_BYTES = 2**17  # of quantized numbers at a time: fits a cache; measured
ROPE_FACTORS = "rope_freqs.weight"
HEADS = {".attn_q.": "num_attention_heads", ".attn_k.": "num_key_value_heads"}  # whose rows are reordered


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Within the block each error becomes a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except KeyError as error:
        raise ValueError(f"{path}: not a usable GGUF file: it lacks the key {error}") from None
    except TooLittleMemory:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: not a usable GGUF file: {one_line(error)}") from None


def read_gguf(
    path: Path, kept: Callable[[str, np.ndarray], Any] = lambda _, weight: weight
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """Configuration, dequantized float32 weights, metadata; ValueError if the file cannot be used.

    `kept(name, weight)` is what is kept of each weight as soon as it has been read.
    """
    with told(path):
        metadata, tensors = read_container(path)
        config = described(metadata, tensors)
        require_tensors(tensors, config)
        require_bytes(f"reading {path.name}", loading_bytes(tensors))
        weights: dict[str, Any] = {}
        for stored, tensor in tensors.items():
            name = hugging_face_name(stored)
            weights[name] = kept(
                name, restore_row_order(stored, dequantize(stored, tensor), metadata, config)
            )
    return config, weights, metadata


def described(metadata: dict[str, Any], tensors: dict[str, StoredTensor]) -> ModelConfig:
    """The configuration; it takes the factors of RoPE, if there are any, out of the tensors."""
    factors = tensors.pop(ROPE_FACTORS, None)
    factors_P = None if factors is None else dequantize(ROPE_FACTORS, factors)
    return config_from_metadata(metadata, tensors, factors_P)


def read_gguf_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and metadata; no weights are read."""
    with told(path):
        metadata, tensors = read_container(path)
        return described(metadata, tensors), metadata


def loading_bytes(tensors: dict[str, StoredTensor]) -> int:
    """Peak memory of reading: the file, all weights in float32, and a copy of the largest one."""
    numbers = [math.prod(tensor.shape) for tensor in tensors.values()]
    return sum(tensor.data.nbytes for tensor in tensors.values()) + 4 * (sum(numbers) + max(numbers))


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone; no weights are read."""
    with told(path):
        return read_container(path)[0]


def require_tensors(tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """ValueError that names the first tensor that is missing, unknown or of another shape."""
    last = f"blk.{config.num_hidden_layers - 1}.attn_norm.weight"
    if last not in tensors:  # checked first, since a huge number of blocks would make a huge list
        raise ValueError(f"the tensor {last} is missing")
    expected = stored_shapes(config)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing")
        if name not in expected:
            raise ValueError(f"the tensor {quote(name)} has no place in this model")
        if tensors[name].shape != expected[name]:
            raise ValueError(
                f"the tensor {name} must have the shape {expected[name]}, got {tensors[name].shape}"
            )


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, under llama.cpp's names."""
    V, D, F, K = config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * K, config.num_key_value_heads * K
    block: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (D,),
        "attn_q.weight": (heads, D),
        "attn_k.weight": (kv_heads, D),
        "attn_v.weight": (kv_heads, D),
        "attn_output.weight": (D, heads),
        "ffn_norm.weight": (D,),
        "ffn_gate.weight": (F, D),
        "ffn_up.weight": (F, D),
        "ffn_down.weight": (D, F),
    }
    if config.qkv_bias:
        block |= {"attn_q.bias": (heads,), "attn_k.bias": (kv_heads,), "attn_v.bias": (kv_heads,)}
    if config.qk_norm:
        block |= {"attn_q_norm.weight": (K,), "attn_k_norm.weight": (K,)}
    shapes = {f"blk.{n}.{name}": block[name] for n in range(config.num_hidden_layers) for name in block}
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (V, D)
    return shapes | {"token_embd.weight": (V, D), "output_norm.weight": (D,)}


def dequantize(name: str, tensor: StoredTensor) -> np.ndarray:
    """The tensor in float32; ValueError for an unsupported type or a value that is not finite."""
    weight = np.empty(math.prod(tensor.shape), np.float32)
    end = 0
    try:
        for part in parts(tensor.data):
            with np.errstate(all="ignore"):  # damaged scales are found below
                numbers = gguf.quants.dequantize(part, tensor.type).ravel()
            start, end = end, end + numbers.size
            weight[start:end] = numbers
    except NotImplementedError:
        raise ValueError(
            f"the tensor {name} is of type {tensor.type.name}, which the gguf package does not dequantize"
        ) from None
    if not np.isfinite(weight).all():
        raise ValueError(
            f"the tensor {name} must be finite, and {np.sum(~np.isfinite(weight))} values are not"
        )
    return weight.reshape(tensor.shape)


def parts(data: np.ndarray) -> Iterator[np.ndarray]:
    """The same rows of blocks, a few at a time; short rows are joined.

    Of a whole tensor the `gguf` package would make two copies, 16 rows at a time, however short they are.
    """
    rows = data.reshape(-1, data.shape[-1])
    together = max(1, min(len(rows), PART_BYTES // rows.shape[1]))
    for start in range(0, len(rows), together):
        yield rows[start : start + together].reshape(1, -1)


def restore_row_order(
    name: str, weight: np.ndarray, metadata: dict[str, Any], config: ModelConfig
) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of Q and K, weights and biases, for `llama`."""
    num_heads = next((getattr(config, field) for part, field in HEADS.items() if part in name), None)
    if metadata["general.architecture"] != "llama" or num_heads is None:
        return weight
    return unpermute(weight, num_heads)


def unpermute(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows from llama.cpp's order, where the rows of a RoPE pair are neighbours, to K/2 rows apart."""
    pairs = weight_OI.reshape(num_heads, -1, 2, *weight_OI.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight_OI.shape)


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, stem = stem.split(".", 2)
        return f"model.layers.{number}.{HUGGING_FACE_NAMES[stem]}.{suffix}"
    return f"{HUGGING_FACE_NAMES[stem]}.{suffix}"
