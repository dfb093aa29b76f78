"""Write a GGUF file of the model with the adapter merged into its weights: for llama.cpp, Ollama, LM Studio.

W' = W + dW as in `fusing.py`. The matrices are float32, float16 or bfloat16, the norms and biases float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import require_choice
from ..disk.files import atomic_write, read_json_object
from ..model import CausalLM
from ..text.template_choice import template_of_adapter
from .adapters import load_adapter
from .checkpoint import LoadedModel, without_stored_head
from .formats.gguf import ROPE_FACTORS, hugging_face_name
from .formats.gguf_config_writer import metadata_of_config, rope_factors
from .formats.gguf_file import read_container
from .formats.gguf_tokenizer import TEMPLATE
from .formats.gguf_tokenizer_writer import metadata_of_tokenizer
from .formats.gguf_writer import ARCHITECTURE, TYPES, TensorInfos, tensor_infos, to_llama_cpp, write_gguf
from .formats.hf_tokenizer import read_templates
from .formats.safetensors import shards
from .fusing import Fusion, Progress, Survival, base_tensors, require_finite, unwatched
from .precision import dtype_of
from .quantized import Quantized

DTYPES = {str(dtype).removeprefix("mlx.core."): dtype for dtype in TYPES}
FIRST_MATRIX = "blk.0.attn_q.weight"  # its type is the file's
DEFAULT_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}  # transformers'
# Of the base's file: how it was quantized, which the new one is not.
OF_THE_FILE = ("general.file_type", "general.quantization_version", "general.quantized_by")


def require_new_gguf(path: Path) -> None:
    """ValueError unless the path ends in .gguf and nothing is there."""
    if path.suffix != ".gguf":
        raise ValueError(f"{path}: the name of a GGUF file must end in .gguf")
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path}: is there already: give the name of a new file")


def fuse_to_gguf(
    loaded: LoadedModel,
    adapter: Path,
    path: Path,
    dequantize: bool,
    dtype: str | None = None,
    progress: Progress = unwatched,
) -> Survival:
    """Write the file, whole or not at all; how much of the update survived rounding.

    `dtype` is that of the matrices: float32, float16 or bfloat16; None keeps the base's, which is float32
    for a GGUF file. Raises ValueError where `path` exists; where the base is MLX-quantized and `dequantize`
    is not set, since GGUF has no such format; where GGUF cannot express the model or its tokenizer; and as
    `fuse` does. `progress` yields the tensors, and may show how many are written.
    """
    require_new_gguf(path)
    require_writable(loaded.model, dequantize, dtype)
    config = loaded.model.config
    metadata = metadata_of(loaded, template_of_adapter(adapter), path.stem)
    load_adapter(loaded.model, adapter)
    fusion = Fusion(loaded, dequantize, None if dtype is None else DTYPES[dtype])
    infos = tensor_infos(config, lambda name: written_dtype(fusion, name))
    metadata["general.file_type"] = int(TYPES[infos[FIRST_MATRIX][1]][1])
    is_llama = metadata[ARCHITECTURE] == "llama"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        write_gguf(part, metadata, infos, progress(fused_arrays(fusion, infos, is_llama), len(infos)))
        fusion.survival.require_finite_sums()
        require_new_gguf(path)  # nothing may have come there in the meantime
    return fusion.survival


def require_writable(model: CausalLM, dequantize: bool, dtype: str | None) -> None:
    """ValueError for a dtype or weights that the file cannot have."""
    if dtype is not None:
        require_choice("the dtype of a GGUF file", dtype, tuple(DTYPES))
    if dtype_of(model) != "float32":
        raise ValueError(f"a model to be fused must be loaded in float32, got {dtype_of(model)}")
    if not dequantize and any(isinstance(module, Quantized) for _, module in model.named_modules()):
        raise ValueError(
            "GGUF cannot hold MLX-quantized weights: give --dequantize to write them unquantized"
        )


def metadata_of(loaded: LoadedModel, template: str | None, name: str) -> dict[str, Any]:
    """The file's metadata: from a folder's configuration and tokenizer, or those of the base's GGUF file.

    `template` replaces the model's chat templates.
    """
    if loaded.path.is_dir():
        record = read_json_object(loaded.path / "config.json")
        context = record.get("max_position_embeddings") or DEFAULT_CONTEXT[record["model_type"]]
        templates = read_templates(loaded.path, read_json_object(loaded.path / "tokenizer_config.json"))
        config = loaded.model.config
        metadata = metadata_of_config(config, context)
        metadata |= metadata_of_tokenizer(loaded.tokenizer, templates, config.vocab_size)
    else:
        stored, _ = read_container(loaded.path)
        prefixes = ("general.", f"{stored[ARCHITECTURE]}.", "tokenizer.")
        metadata = {key: stored[key] for key in stored if key.startswith(prefixes) and key not in OF_THE_FILE}
    if template is not None:
        kept = {key: value for key, value in metadata.items() if not key.startswith(TEMPLATE)}
        metadata = kept | {TEMPLATE: template}
    return metadata | {"general.name": name}


def written_dtype(fusion: Fusion, name: str) -> mx.Dtype:
    """The dtype in which a matrix is written: the one asked for, or that of the base's file."""
    if fusion.dtype is not None:
        return fusion.dtype
    scales = f"{name.removesuffix('.weight')}.scales"  # of a quantized one
    stored = fusion.dtypes.get(scales, fusion.dtypes.get(name, mx.float32))
    return stored if stored in TYPES else mx.float32


def fused_arrays(fusion: Fusion, infos: TensorInfos, is_llama: bool) -> Iterator[np.ndarray]:
    """The values of all tensors, one at a time in memory beside the model."""
    config = fusion.loaded.model.config
    stored = without_stored_head(lazy_tensors(fusion.loaded), config)
    factors_P = rope_factors(config)
    for name in infos:
        if name == ROPE_FACTORS:
            assert factors_P is not None
            yield factors_P
            continue
        base_name, dtype = hugging_face_name(name), infos[name][1]
        fused = fusion.fuse_tensor(base_name, stored.pop(base_name))
        assert fused is not None
        array = fused.astype(dtype)
        require_finite(base_name, array)
        yield to_llama_cpp(name, array, config, is_llama)


def lazy_tensors(loaded: LoadedModel) -> dict[str, mx.array]:
    """The base's tensors as stored; those of a folder are read when they are used."""
    if loaded.path.is_file():
        return base_tensors(loaded.model)
    return {
        name: array
        for file, _ in shards(loaded.path)
        for name, array in mx.load(str(file), format="safetensors").items()
    }
