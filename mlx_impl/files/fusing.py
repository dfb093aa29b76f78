"""Write a Hugging Face folder of the model with the adapter merged into its weights.

W' = W + dW is computed in float32 and rounded to the format of the base's file: a float dtype or, for an
MLX-quantized base, integers of a few bits. How much of dW is left after rounding is measured, with
dW' = (rounded W') - W: `survived` is <dW', dW> / |dW|^2 and `error` is |dW' - dW| / |dW|. An update smaller
than half a rounding step is lost: the weight is rounded back to where it was.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..disk.files import read_json_object
from ..disk.folders import TemporaryFolder, atomic_folder
from ..disk.output_folder import require_new_folder, require_no_overlap
from ..lora import FACTORS, dense_weight_OI, lora_layers
from ..model import CausalLM
from ..text.template_choice import FILE as TEMPLATE_FILE
from ..text.template_choice import template_of_adapter
from .adapters import load_adapter
from .checkpoint import LoadedModel, without_stored_head
from .formats.gguf_file import read_container
from .formats.gguf_vocabulary import read_vocabulary
from .formats.hf_config import read_config
from .formats.hf_folder import complete, copy_side_files, to_json, write_json, write_tokenizer, write_weights
from .formats.safetensors import load, shards, tensor_dtypes
from .precision import dtype_of
from .quantized import Plain, Quantized
from .requantize import requantize

LARGE_ERROR = 0.5  # a rounding error above this share of the update is worth a warning
QUANTIZATION_KEYS = ("quantization", "quantization_config")
Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # the same items, of which there are so many


def unwatched(items: Iterable[Any], num_items: int) -> Iterable[Any]:
    return items


@dataclass
class Survival:
    """How much of the update survives rounding: sums over all fused weights, in float32."""

    written_dot_update: float = 0.0  # <dW', dW>
    update_squared: float = 0.0  # |dW|^2
    error_squared: float = 0.0  # |dW' - dW|^2
    is_quantized: bool = False  # whether the fused weights are

    def add(self, base_OI: mx.array, written_OI: mx.array, delta_OI: mx.array) -> None:
        written_delta_OI = written_OI.astype(mx.float32) - base_OI
        self.written_dot_update += (written_delta_OI * delta_OI).sum().item()
        self.update_squared += mx.square(delta_OI).sum().item()
        self.error_squared += mx.square(written_delta_OI - delta_OI).sum().item()

    def require_finite_sums(self) -> None:
        """ValueError if a sum overflowed float32, since then nothing is known about the rounding error."""
        sums = (self.written_dot_update, self.update_squared, self.error_squared)
        if not all(map(math.isfinite, sums)):
            raise ValueError(
                "the update is too large to be fused: its rounding error overflows float32, "
                f"got <dW', dW> = {sums[0]:g}, |dW|^2 = {sums[1]:g}, |dW' - dW|^2 = {sums[2]:g}"
            )

    @property
    def survived(self) -> float:
        return self.written_dot_update / self.update_squared if self.update_squared else 1.0

    @property
    def error(self) -> float:
        return float((self.error_squared / self.update_squared) ** 0.5) if self.update_squared else 0.0


def fuse(
    loaded: LoadedModel, adapter: Path, folder: Path, dequantize: bool, progress: Progress = unwatched
) -> Survival:
    """Write the folder, whole or not at all; how much of the update survived rounding.

    Quantized weights keep their bits and groups, or with `dequantize` become plain weights in the dtype of
    their scales. Raises ValueError if the folder is not new or empty, or overlaps with what is read; if the
    adapter does not fit the model or is too large; if the model was loaded in bfloat16, which would lose
    digits that its file has. `progress` yields the base's tensors, and may show how many are done.
    """
    require_no_overlap(folder, {"model": loaded.path, "adapter": adapter})
    require_new_folder(folder)
    if dtype_of(loaded.model) != "float32":
        raise ValueError(f"a model to be fused must be loaded in float32, got {dtype_of(loaded.model)}")
    load_adapter(loaded.model, adapter)
    fusion = Fusion(loaded, dequantize)
    has_quantized = any(isinstance(module, Quantized) for _, module in loaded.model.named_modules())
    fusion.survival.is_quantized = has_quantized and not dequantize
    with atomic_folder(folder) as part:
        if loaded.path.is_dir():
            write_description(loaded, part, dequantize)
        else:
            write_gguf_description(loaded, part)
        if (template := template_of_adapter(adapter)) is not None:
            part.file(TEMPLATE_FILE).write_bytes(template.encode())
        write_weights(part, fusion.tensors(progress), "mlx" if fusion.survival.is_quantized else "pt")
        fusion.survival.require_finite_sums()
        if read_config(part.path) != loaded.model.config:
            raise ValueError(f"{loaded.path}: this configuration cannot be written as a config.json")
    return fusion.survival


def write_description(loaded: LoadedModel, folder: TemporaryFolder, dequantize: bool) -> None:
    """Write the base's configuration, without its quantization if it is dequantized, and its tokenizer."""
    copy_side_files(loaded.path, folder)
    written = folder.file("config.json")
    shutil.copyfile(loaded.path / "config.json", written)
    stored = read_json_object(written)
    config = complete(stored, loaded.model.config)
    if dequantize and any(config.get(key) for key in QUANTIZATION_KEYS):
        config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if config != stored:
        write_json(written, config)


def write_gguf_description(loaded: LoadedModel, folder: TemporaryFolder) -> None:
    """Write configuration and tokenizer from a GGUF file's metadata; its weights are written as float32."""
    metadata, _ = read_container(loaded.path)
    vocabulary = read_vocabulary(metadata)
    stops = sorted(loaded.tokenizer.stop_ids)
    extra = {
        "max_position_embeddings": metadata.get(f"{metadata['general.architecture']}.context_length"),
        "bos_token_id": loaded.tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else loaded.tokenizer.eos_id,
    }
    write_json(folder.file("config.json"), to_json(loaded.model.config, "float32", extra))
    settings = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unknown,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    write_tokenizer(folder, loaded.tokenizer, settings)


class Fusion:
    """The tensors to write: those of the base's files, the adapted ones with the update added.

    `dtype` is that of the fused weights; None: as in the base's file.
    """

    def __init__(self, loaded: LoadedModel, dequantize: bool, dtype: mx.Dtype | None = None) -> None:
        self.loaded, self.dequantize, self.survival = loaded, dequantize, Survival()
        self.dtype = dtype
        self.dtypes = stored_dtypes(loaded)
        modules = loaded.model.named_modules()
        self.bases = {name: module for name, module in modules if isinstance(module, Plain | Quantized)}
        self.layers = lora_layers(loaded.model)
        self.bases |= {name: layer.linear for name, layer in self.layers.items()}
        self.pending: dict[str, mx.array] = {}  # computed but not yet written

    def tensors(self, progress: Progress) -> Iterator[tuple[str, mx.array]]:
        stored = (
            pair
            for tensors in stored_tensors(self.loaded)
            for pair in without_stored_head(tensors, self.loaded.model.config).items()
        )
        for name, array in progress(stored, len(self.dtypes) or len(base_tensors(self.loaded.model))):
            fused = self.fuse_tensor(name, array)
            if fused is not None:
                yield name, fused

    def fuse_tensor(self, name: str, array: mx.array) -> mx.array | None:
        """What to write for a tensor of the base: W + dW, the tensor as it is, or None for nothing."""
        linear, _, kind = name.rpartition(".")
        base = self.bases.get(linear)
        is_dequantized = isinstance(base, Quantized) and self.dequantize
        if kind == "bias" or (linear not in self.layers and not is_dequantized):
            return array
        if not isinstance(base, Quantized):
            return self.plain_weight(linear, array.dtype)
        if self.dequantize:
            return self.plain_weight(linear, self.dtypes[f"{linear}.scales"]) if kind == "weight" else None
        if name not in self.pending:
            self.pending |= self.quantized_weight(linear, base, self.dtypes[f"{linear}.scales"])
        return self.pending.pop(name)

    def plain_weight(self, name: str, dtype: mx.Dtype) -> mx.array:
        """W + dW in this dtype; W if the linear has no adapter."""
        base_OI = dense_weight_OI(self.bases[name]).astype(mx.float32)
        dtype = dtype if self.dtype is None else self.dtype
        if name not in self.layers:
            return base_OI.astype(dtype)
        delta_OI = self.layers[name].delta_OI()
        fused_OI = (base_OI + delta_OI).astype(dtype)
        require_finite(name, fused_OI)
        self.survival.add(base_OI, fused_OI, delta_OI)
        return fused_OI

    def quantized_weight(self, name: str, base: Quantized, dtype: mx.Dtype) -> dict[str, mx.array]:
        """W + dW in the base's group size and bits, with scales of this dtype."""
        delta_OI = self.layers[name].delta_OI()
        base_OI, how = dense_weight_OI(base), (base.group_size, base.bits)
        require_finite(name, (base_OI + delta_OI).astype(dtype))
        q, scales, biases = requantize(base_OI + delta_OI, base, dtype)
        written_OI = mx.dequantize(q, scales.astype(mx.float32), biases.astype(mx.float32), *how)
        self.survival.add(base_OI, written_OI, delta_OI)
        return {f"{name}.weight": q, f"{name}.scales": scales, f"{name}.biases": biases}


def stored_tensors(loaded: LoadedModel) -> Iterator[dict[str, mx.array]]:
    """The base's tensors as stored, one file at a time; those of a GGUF file are dequantized."""
    if loaded.path.is_dir():
        yield from (load(file) for file, _ in shards(loaded.path))
    else:
        yield base_tensors(loaded.model)


def stored_dtypes(loaded: LoadedModel) -> dict[str, mx.Dtype]:
    if not loaded.path.is_dir():
        return {}
    return {name: dtype for file, _ in shards(loaded.path) for name, dtype in tensor_dtypes(file).items()}


def base_tensors(model: CausalLM) -> dict[str, mx.array]:
    """The frozen weights, under their names in a model without an adapter."""
    base = [(n, a) for n, a in tree_flatten(model.parameters()) if n.rpartition(".")[2] not in FACTORS]
    return {name.replace(".linear.", "."): array for name, array in base}


def require_finite(name: str, weight_OI: mx.array) -> None:
    if not mx.isfinite(weight_OI).all():
        raise ValueError(f"a fused weight must be finite, and that of {name} is not in {weight_OI.dtype}")
