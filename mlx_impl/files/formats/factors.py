"""An adapter as its two files hold it: the record in `adapter_config.json` and the tensors.

In memory the tensors have this project's names and orientation in either format: `<linear>.lora_a` (I, R),
`<linear>.lora_b` (R, O) and with DoRA `<linear>.magnitude` (O,). They keep the dtype they were stored in.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...disk.files import atomic_write
from .safetensors import load_with_metadata, save

CONFIG = "adapter_config.json"
Tensors = dict[str, mx.array]
BLOCK = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class AdapterFile:
    """`original` is the record in the other format, if the adapter was converted from that format."""

    record: dict[str, Any]
    tensors: Tensors
    original: dict[str, Any] | None = None


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors under the file's own names, and metadata; ValueError unless all are finite floats."""
    tensors, metadata = load_with_metadata(path)
    if not tensors:
        raise ValueError(f"{path}: holds no tensor")
    for name, array in tensors.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{path}: the tensor {name!r} must be of floats, got {array.dtype}")
        if not mx.isfinite(array).all():
            raise ValueError(f"{path}: the tensor {name!r} must be finite, got infinity or NaN")
    return tensors, metadata


def write_files(
    folder: Path, file_name: str, tensors: Tensors, record: dict[str, Any], metadata: dict[str, str]
) -> None:
    """Write tensors and record, each file atomically.

    The record's patterns keep their order, because the first that matches a linear decides.
    """
    with atomic_write(folder / file_name) as path:
        save(path, tensors, metadata)
    with atomic_write(folder / CONFIG) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def by_linear(tensors: Tensors) -> dict[str, Tensors]:
    """{linear: {"lora_a": ..., "lora_b": ..., "magnitude": ...}}; ValueError if their shapes differ."""
    linears: dict[str, Tensors] = {}
    for name, array in sorted(tensors.items()):
        linear, _, factor = name.rpartition(".")
        linears.setdefault(linear, {})[factor] = array
    for linear, factors in linears.items():
        for factor, num_axes in (("lora_a", 2), ("lora_b", 2), ("magnitude", 1)):
            if factor not in factors and factor != "magnitude":
                raise ValueError(f"the tensor {linear}.{factor} is missing")
            if factor in factors and factors[factor].ndim != num_axes:
                shape = factors[factor].shape
                raise ValueError(f"the tensor {linear}.{factor} must have {num_axes} axes, got {shape}")
        ranks = factors["lora_a"].shape[1], factors["lora_b"].shape[0]
        if ranks[0] != ranks[1]:
            raise ValueError(
                f"the factors of {linear} must have the same rank, got {ranks[0]} and {ranks[1]}"
            )
        if "magnitude" in factors and factors["magnitude"].shape[0] != factors["lora_b"].shape[1]:
            raise ValueError(f"{linear}.magnitude must have one value per output of {linear}")
    return linears


def split_block(linear: str) -> tuple[int, str] | None:
    """model.layers.3.mlp.up_proj -> (3, "mlp.up_proj"); None for a name outside the blocks."""
    match = BLOCK.fullmatch(linear)
    return (int(match[1]), match[2]) if match else None


def is_identical(one: AdapterFile, other: AdapterFile) -> bool:
    """Whether record, names, dtypes and bytes are the same; `original` is not compared."""
    return (
        one.record == other.record
        and one.tensors.keys() == other.tensors.keys()
        and all(same_bytes(array, other.tensors[name]) for name, array in one.tensors.items())
    )


def same_bytes(one: mx.array, other: mx.array) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return bool(mx.array_equal(mx.contiguous(one).view(mx.uint8), mx.contiguous(other).view(mx.uint8)))
