"""A Hugging Face folder of the model with the adapter in its weights, in the types and bits of the base.

W' = W + dW is formed in float32 and rounded to what the base's file has: a type of float, or, in an
MLX-quantized base, whole numbers of a few bits. How much of dW is left is measured: with dW' what the written
weight differs from W by, `survived` is <dW', dW> / |dW|^2, and `error` |dW' - dW| / |dW|. A weight that lies
on a grid falls back on it when the update is smaller than half a step: of a small update nothing is left.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..disk.files import read_json_object
from ..disk.folders import TemporaryFolder, atomic_folder
from ..disk.output_folder import require_new_folder, require_no_overlap
from ..lora import FACTORS, dense_weight_OI, lora_layers
from ..model import CausalLM
from .adapters import load_adapter
from .checkpoint import LoadedModel, without_stored_head
from .formats.gguf_file import read_container
from .formats.gguf_vocabulary import read_vocabulary
from .formats.hf_config import read_config
from .formats.hf_folder import copy_side_files, to_json, write_json, write_tokenizer, write_weights
from .formats.safetensors import load, shards, types
from .precision import dtype_of
from .requantize import requantize

LITTLE = 0.5  # an error of more than this share of the update leaves little of it
QUANTIZATION = ("quantization", "quantization_config")
PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@dataclass
class Survival:
    """Sums over the fused weights, in float32."""

    got_times_wanted: float = 0.0
    wanted_squared: float = 0.0
    lost_squared: float = 0.0
    is_quantized: bool = False  # whether the fused weights are

    def add(self, base_OI: mx.array, written_OI: mx.array, delta_OI: mx.array) -> None:
        got_OI = written_OI.astype(mx.float32) - base_OI
        self.got_times_wanted += (got_OI * delta_OI).sum().item()
        self.wanted_squared += mx.square(delta_OI).sum().item()
        self.lost_squared += mx.square(got_OI - delta_OI).sum().item()

    def require_finite(self) -> None:
        """ValueError where a sum is past float32: nothing is known then of what the folder holds."""
        sums = (self.got_times_wanted, self.wanted_squared, self.lost_squared)
        if not all(map(math.isfinite, sums)):
            raise ValueError(
                "the update is too large to be fused: what is left of it cannot be counted in float32, "
                f"got <dW', dW> = {sums[0]:g}, |dW|^2 = {sums[1]:g}, |dW' - dW|^2 = {sums[2]:g}"
            )

    @property
    def survived(self) -> float:
        return self.got_times_wanted / self.wanted_squared if self.wanted_squared else 1.0

    @property
    def error(self) -> float:
        return float((self.lost_squared / self.wanted_squared) ** 0.5) if self.wanted_squared else 0.0


def fuse(loaded: LoadedModel, adapter: Path, folder: Path, dequantize: bool) -> Survival:
    """Write the folder, whole or not at all; what is left of the update.

    Quantized weights stay quantized as they were, or become plain ones in the type of their scales.
    Raises ValueError when the folder is not new or empty or touches what is read, the adapter is not this
    model's or too large, or the model is not in float32, without digits that its file has.
    """
    require_no_overlap(folder, {"model": loaded.path, "adapter": adapter})
    require_new_folder(folder)
    if dtype_of(loaded.model) != "float32":
        raise ValueError(f"a model to be fused must be loaded in float32, got {dtype_of(loaded.model)}")
    load_adapter(loaded.model, adapter)
    fusion = Fusion(loaded, dequantize)
    has_packed = any(isinstance(module, PACKED) for _, module in loaded.model.named_modules())
    fusion.survival.is_quantized = has_packed and not dequantize
    with atomic_folder(folder) as part:
        if loaded.path.is_dir():
            write_description(loaded.path, part, dequantize)
        else:
            write_gguf_description(loaded, part)
        write_weights(part, fusion.tensors(), "mlx" if fusion.survival.is_quantized else "pt")
        fusion.survival.require_finite()
        if read_config(part.path) != loaded.model.config:
            raise ValueError(f"{loaded.path}: this configuration cannot be written as a config.json")
    return fusion.survival


def write_description(source: Path, folder: TemporaryFolder, dequantize: bool) -> None:
    """The base's own files, but for what no longer holds."""
    copy_side_files(source, folder)
    written = folder.file("config.json")
    shutil.copyfile(source / "config.json", written)
    config = read_json_object(source / "config.json")
    if dequantize and any(config.pop(key, None) for key in QUANTIZATION):
        write_json(written, {k: v for k, v in config.items() if k not in QUANTIZATION})


def write_gguf_description(loaded: LoadedModel, folder: TemporaryFolder) -> None:
    """Made of what the GGUF file says; the weights, whose blocks are dequantized, are float32."""
    metadata, _ = read_container(loaded.path)
    vocabulary = read_vocabulary(metadata)
    stops = sorted(loaded.tokenizer.stop_ids)
    more = {
        "max_position_embeddings": metadata.get(f"{metadata['general.architecture']}.context_length"),
        "bos_token_id": loaded.tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else loaded.tokenizer.eos_id,
    }
    write_json(folder.file("config.json"), to_json(loaded.model.config, "float32", more))
    settings = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unknown,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    write_tokenizer(folder, loaded.tokenizer, settings)


class Fusion:
    """The tensors of the base's files under their names, with the update in those of adapted linears."""

    def __init__(self, loaded: LoadedModel, dequantize: bool) -> None:
        self.loaded, self.dequantize, self.survival = loaded, dequantize, Survival()
        self.types = stored_types(loaded)
        self.bases = dict(loaded.model.named_modules())
        self.layers = lora_layers(loaded.model)
        self.bases |= {name: layer.linear for name, layer in self.layers.items()}
        self.packed: dict[str, mx.array] = {}  # tensors of which only one has been asked for

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        for stored in stored_tensors(self.loaded):
            for name, array in without_stored_head(stored, self.loaded.model.config).items():
                fused = self.fused(name, array)
                if fused is not None:
                    yield name, fused

    def fused(self, name: str, array: mx.array) -> mx.array | None:
        """What is written for a tensor of the base: itself where nothing changes, None for nothing."""
        linear, _, kind = name.rpartition(".")
        is_packed = isinstance(self.bases.get(linear), PACKED)
        if kind == "bias" or (linear not in self.layers and not (is_packed and self.dequantize)):
            return array
        if not is_packed:
            return self.plain(linear, array.dtype)
        if self.dequantize:
            return self.plain(linear, self.types[f"{linear}.scales"]) if kind == "weight" else None
        if name not in self.packed:
            self.packed |= self.quantized(linear, self.types[f"{linear}.scales"])
        return self.packed.pop(name)

    def plain(self, name: str, dtype: mx.Dtype) -> mx.array:
        """W + dW in this type; W alone where there is no adapter."""
        base_OI = dense_weight_OI(self.bases[name]).astype(mx.float32)
        if name not in self.layers:
            return base_OI.astype(dtype)
        delta_OI = self.layers[name].delta_OI()
        fused_OI = finite(name, (base_OI + delta_OI).astype(dtype))
        self.survival.add(base_OI, fused_OI, delta_OI)
        return fused_OI

    def quantized(self, name: str, dtype: mx.Dtype) -> dict[str, mx.array]:
        """W + dW in the base's groups and bits, with scales of this type."""
        base, delta_OI = self.bases[name], self.layers[name].delta_OI()
        base_OI, how = dense_weight_OI(base), (base.group_size, base.bits)
        finite(name, (base_OI + delta_OI).astype(dtype))
        q, scales, biases = requantize(base_OI + delta_OI, base, dtype)
        written_OI = mx.dequantize(q, scales.astype(mx.float32), biases.astype(mx.float32), *how)
        self.survival.add(base_OI, written_OI, delta_OI)
        return {f"{name}.weight": q, f"{name}.scales": scales, f"{name}.biases": biases}


def stored_tensors(loaded: LoadedModel) -> Iterator[dict[str, mx.array]]:
    """A file at a time, as it is stored; those of a GGUF file dequantized."""
    if loaded.path.is_dir():
        yield from (load(file) for file, _ in shards(loaded.path))
    else:
        yield base_tensors(loaded.model)


def stored_types(loaded: LoadedModel) -> dict[str, mx.Dtype]:
    if not loaded.path.is_dir():
        return {}
    return {name: kind for file, _ in shards(loaded.path) for name, kind in types(file).items()}


def base_tensors(model: CausalLM) -> dict[str, mx.array]:
    """The weights under the names that they have without an adapter."""
    base = [(n, a) for n, a in tree_flatten(model.parameters()) if n.rpartition(".")[2] not in FACTORS]
    return {name.replace(".linear.", "."): array for name, array in base}


def finite(name: str, weight_OI: mx.array) -> mx.array:
    if not mx.isfinite(weight_OI).all():
        raise ValueError(f"a fused weight must be finite, and that of {name} is not in {weight_OI.dtype}")
    return weight_OI
