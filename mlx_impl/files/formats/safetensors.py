"""The tensors of a Hugging Face folder: one safetensors file, or several with an index.

Source: the safetensors format; Hugging Face's `model.safetensors.index.json`, whose `weight_map` says which
file holds which tensor. Nothing can notice a flipped bit in a weight, but everything else is checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import mlx.core as mx

from ...disk.files import one_line, read_json_object, require_file
from ..precision import rounded

INDEX = "model.safetensors.index.json"
# Constants that old checkpoints store, which follow from the configuration.
DERIVED = ".rotary_emb.inv_freq"


def read_folder(folder: Path, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """All tensors of a folder, floats in this type; ValueError in one sentence for what is damaged."""
    weights: dict[str, mx.array] = {}
    files = list(shards(folder))
    everything = set().union(*(promised for _, promised in files))
    for file, promised in files:
        tensors = read_file(file, everything, dtype)
        for name in sorted(promised - tensors.keys()):
            raise ValueError(f"{file}: the tensor {one_line(name)}, which {INDEX} says is here, is missing")
        for name in sorted(weights.keys() & tensors.keys()):
            raise ValueError(f"{file}: the tensor {name} is in another file of the folder too")
        weights |= tensors
    return {name: array for name, array in weights.items() if not name.endswith(DERIVED)}


def loading_bytes(folder: Path, dtype: mx.Dtype) -> int:
    """The most that `read_folder` holds: each tensor as stored or as it becomes, a copy of the largest."""
    sizes = [0]
    for file in (file for file, _ in shards(folder) if file.is_file()):  # what is none, reading it will say
        try:
            arrays = mx.load(str(file), format="safetensors").values()  # lazy: no tensor is read
        except (RuntimeError, ValueError):  # likewise
            continue
        sizes += [max(a.nbytes, 0 if a.dtype == mx.uint32 else a.size * dtype.size) for a in arrays]
    return sum(sizes) + max(sizes)


def shards(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Every file, and the names of the tensors that an index says are in it."""
    if (folder / INDEX).exists():
        yield from indexed(folder)
        return
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: there must be a *.safetensors file in it")
    for file in files:
        yield file, set()


def indexed(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    path = folder / INDEX
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map must be an object from tensors to files")
    names: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not is_file_name(file):
            raise ValueError(
                f"{path}: weight_map must name safetensors files of this folder, got {file!r:.100} for {name}"
            )
        names.setdefault(file, set()).add(name)
    for file in sorted(names):
        yield folder / file, names[file]


def is_file_name(value: object) -> bool:
    """Of this folder, and no other."""
    is_name = isinstance(value, str) and value.isprintable() and value == Path(value).name
    return is_name and str(value).endswith(".safetensors")


def read_file(
    file: Path, elsewhere: Collection[str] = (), dtype: mx.Dtype = mx.float32
) -> dict[str, mx.array]:
    """The tensors of a file, floats in this type.

    Packed weights, which have scales, here or elsewhere, are as stored.
    """
    weights = load(file)
    for name, array in weights.items():
        scales = f"{name.removesuffix('.weight')}.scales"
        is_packed = array.dtype == mx.uint32 and (scales in weights or scales in elsewhere)
        if not is_packed and not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{file}: the tensor {name!r} must be of floats, got {array.dtype}")
        if not is_packed:
            weights[name] = rounded(f"{file}: the tensor {name!r}", array, dtype)
    return weights


def load(file: Path) -> dict[str, mx.array]:
    return load_with_metadata(file)[0]


def load_with_metadata(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Everything as it is stored; ValueError for what is no safetensors file."""
    if not file.exists():
        raise ValueError(f"{file}: must be a safetensors file, and there is none of this name")
    require_file(file)
    try:
        weights, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
        mx.eval(weights)  # MLX: loading is lazy too; a truncated file shows only here
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: not a readable safetensors file: {one_line(error)}") from None
    for name in weights:
        if not name.isprintable():
            raise ValueError(f"{file}: the names of tensors must be printable, got {name!r}")
    return weights, metadata


def types(file: Path) -> dict[str, mx.Dtype]:
    """Of the tensors of a file that can be read, which are not."""
    require_file(file)
    return {name: array.dtype for name, array in mx.load(str(file), format="safetensors").items()}


def save(file: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Through a file of Python's: OSError then says what is wrong with the disk, where MLX's own does not."""
    with open(file, "wb") as opened:
        mx.save_safetensors(opened, tensors, metadata=metadata)
