"""Read the tensors of a Hugging Face folder: one safetensors file, or several (shards) with an index.

Source: the safetensors format; Hugging Face's `model.safetensors.index.json`, whose `weight_map` says which
file holds which tensor. Everything is checked but the values of finite weights: the format has no checksum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import mlx.core as mx

from ...disk.files import one_line, read_json_object, require_file
from ..precision import cast_finite

LFS_POINTER = b"version https://git-lfs"
INDEX = "model.safetensors.index.json"
# Old checkpoints store these constants, which follow from the configuration.
CONSTANTS = ".rotary_emb.inv_freq"


def read_folder(folder: Path, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """All tensors of a folder, floats in this dtype; ValueError if a file is missing or damaged."""
    weights: dict[str, mx.array] = {}
    files = list(shards(folder))
    all_indexed = set().union(*(indexed for _, indexed in files))
    for file, indexed in files:
        tensors = read_file(file, all_indexed, dtype)
        for name in sorted(indexed - tensors.keys()):
            raise ValueError(f"{file}: must hold the tensor {one_line(name)}, as {INDEX} says, but does not")
        for name in sorted(weights.keys() & tensors.keys()):
            raise ValueError(f"{file}: the tensor {name} is also in another file of the folder")
        weights |= tensors
    return {name: array for name, array in weights.items() if not name.endswith(CONSTANTS)}


def loading_bytes(folder: Path, dtype: mx.Dtype) -> int:
    """Peak memory of `read_folder`: all tensors in their final size; one as stored, and its check."""
    sizes, single = [0], 0
    for file in (file for file, _ in shards(folder) if file.is_file()):  # reading reports the others
        try:
            arrays = list(mx.load(str(file), format="safetensors").values())  # lazy: no tensor is read
        except (RuntimeError, ValueError):  # reading reports it
            continue
        finals = [a.nbytes if a.dtype == mx.uint32 else a.size * dtype.size for a in arrays]
        single = max(single, *(a.nbytes + 2 * final for a, final in zip(arrays, finals, strict=True)), 0)
        sizes += finals
    return sum(sizes) + single


def shards(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Every file of tensors, with the names that the index lists for it, if there is an index."""
    if (folder / INDEX).exists():
        yield from indexed_shards(folder)
        return
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: must hold a *.safetensors file, and holds none")
    for file in files:
        yield file, set()


def indexed_shards(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    path = folder / INDEX
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map must be an object that gives each tensor its file")
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
    """Whether it is the name of a safetensors file without a path to another folder."""
    is_name = isinstance(value, str) and value.isprintable() and value == Path(value).name
    return is_name and str(value).endswith(".safetensors")


def read_file(
    file: Path, in_other_files: Collection[str] = (), dtype: mx.Dtype = mx.float32
) -> dict[str, mx.array]:
    """The tensors of a file, floats in this dtype, read one by one.

    Quantized weights stay as stored: those of uint32 that have scales, here or in another file.
    """
    weights, _ = load_lazily(file)
    for name, array in weights.items():
        read(file, array)
        scales = f"{name.removesuffix('.weight')}.scales"
        is_quantized = array.dtype == mx.uint32 and (scales in weights or scales in in_other_files)
        if not is_quantized and not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{file}: the tensor {name!r} must be of floats, got {array.dtype}")
        if not is_quantized:
            weights[name] = cast_finite(f"{file}: the tensor {name!r}", array, dtype)
    return weights


def load(file: Path) -> dict[str, mx.array]:
    return load_with_metadata(file)[0]


def load_with_metadata(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Tensors and metadata as stored; ValueError if it is not a safetensors file."""
    weights, metadata = load_lazily(file)
    read(file, weights)
    return weights, metadata


def load_lazily(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The same; a tensor is read when it is evaluated."""
    if not file.exists():
        raise ValueError(f"{file}: there is no such safetensors file")
    require_file(file)
    require_no_pointer(file)
    try:
        weights, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise unreadable(file, error) from None
    for name in weights:
        if not name.isprintable():
            raise ValueError(f"{file}: the names of tensors must be printable, got {name!r}")
    return weights, metadata


def read(file: Path, tensors: mx.array | dict[str, mx.array]) -> None:
    """Read these lazy tensors of the file; ValueError if it has been truncated."""
    try:
        mx.eval(tensors)
    except (RuntimeError, ValueError) as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file}: not a readable safetensors file: {one_line(error)}")


def require_no_pointer(file: Path) -> None:
    """ValueError for what a clone without Git LFS has in place of a large file."""
    with open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file}: must be the file itself, but is a Git LFS pointer: run `git lfs pull`")


def tensor_dtypes(file: Path) -> dict[str, mx.Dtype]:
    """The dtype of every tensor in a valid file, without reading the values."""
    require_file(file)
    return {name: array.dtype for name, array in mx.load(str(file), format="safetensors").items()}


def save(file: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write through a Python file: its OSError says what is wrong with the disk, MLX's error does not."""
    with open(file, "wb") as opened:
        mx.save_safetensors(opened, tensors, metadata=metadata)
