"""Read the GGUF container: metadata, and the type, shape and bytes of each tensor.

Source: ggml's GGUF specification, versions 2 and 3, little-endian. Every length is checked against the size
of the file before it is used. On a damaged array length the `gguf` package's own reader loops almost without
end, and `mx.load` crashes the process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

STRING, ARRAY = 8, 9  # numbers of value types in the file
LENGTH_BYTES = 8  # before a text
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
MAX_ARRAY = 2**24  # elements; the longest arrays of real models, tokenizer merges, have under a million
MAX_QUOTE = 80  # characters of a value in an error message


class StoredTensor(NamedTuple):
    """A tensor as stored in the file."""

    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # of the values, slowest axis first, as in NumPy
    data: np.ndarray  # bytes, in blocks along the last axis


class Cursor:
    """Reads forward through the bytes of a file; ValueError at its end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.offset = data, 0

    def take(self, num_bytes: int) -> np.ndarray:
        if num_bytes > self.data.size - self.offset:
            raise ValueError(
                f"{num_bytes} bytes should follow byte {self.offset}, but the file has only {self.data.size}"
            )
        self.offset += num_bytes
        return self.data[self.offset - num_bytes : self.offset]

    def numbers(self, kind: str, count: int) -> list[Any]:
        return self.take(count * np.dtype(kind).itemsize).view(kind).tolist()

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def text(self) -> str:
        try:
            return self.take(self.number("<u8")).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the text that ends at byte {self.offset} must be UTF-8, and is not") from None

    def texts(self, count: int) -> list[str]:
        """So many texts; ends soon on a damaged count, because each takes 8 bytes or more."""
        view, texts = self.data.data, []
        for _ in range(count):
            start = self.offset + LENGTH_BYTES
            end = start + int.from_bytes(view[self.offset : start], "little")
            if end > self.data.size or start > self.data.size:
                self.text()  # raises
            try:
                texts.append(str(view[start:end], "utf-8"))
            except UnicodeDecodeError:
                self.text()  # raises
            self.offset = end
        return texts

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"the value type at byte {self.offset} is unknown, got {kind}")
        kind, count = self.number("<u4"), self.number("<u8")
        if count > MAX_ARRAY:
            raise ValueError(
                f"the array at byte {self.offset} must have at most {MAX_ARRAY} values, got {count}"
            )
        if kind in SCALARS:
            return self.numbers(SCALARS[kind], count)
        if kind != STRING:
            raise ValueError(
                f"the array at byte {self.offset} has elements of value type {kind}, which is not supported"
            )
        return self.texts(count)


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata, and tensors by name; ValueError, without the file's name, for a damaged file."""
    if not path.stat().st_size:
        raise ValueError("it is empty")
    cursor = Cursor(np.memmap(path, mode="r").view(np.ndarray))
    if cursor.take(4).tobytes() != b"GGUF":
        raise ValueError("it must begin with the letters GGUF")
    version, num_tensors, num_keys = cursor.number("<u4"), cursor.number("<u8"), cursor.number("<u8")
    if version not in (2, 3):
        raise ValueError(f"its version must be 2 or 3, got {version}")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"the key {quote(key)} appears twice")
        metadata[key] = cursor.value(cursor.number("<u4"))
    return metadata, read_tensors(cursor, num_tensors, metadata.get("general.alignment", 32))


def read_tensors(cursor: Cursor, num_tensors: int, alignment: object) -> dict[str, StoredTensor]:
    """Read the descriptions of all tensors, then their bytes, which must not overlap."""
    described = [read_tensor_info(cursor) for _ in range(num_tensors)]
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {quote(alignment)}")
    first = cursor.offset = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, kind, shape, offset in sorted(described, key=lambda info: info[3]):
        if name in tensors:
            raise ValueError(f"the tensor {quote(name)} appears twice")
        if first + offset < cursor.offset:
            raise ValueError(f"the tensor {quote(name)} overlaps another one")
        cursor.offset = first + offset
        try:
            data = cursor.take(math.prod(byte_shape := gguf.quant_shape_to_byte_shape(shape, kind)))
        except ValueError as error:
            raise ValueError(f"the tensor {quote(name)} cannot be read: {error}") from None
        tensors[name] = StoredTensor(kind, shape, data.reshape(byte_shape))
    return tensors


def read_tensor_info(cursor: Cursor) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
    """Name, type, shape, and offset of the bytes, of one tensor."""
    name, num_axes = cursor.text(), cursor.number("<u4")
    if not 1 <= num_axes <= 4:
        raise ValueError(f"the tensor {quote(name)} must have 1 to 4 axes, got {num_axes}")
    shape = tuple(reversed(cursor.numbers("<u8", num_axes)))
    number, offset = cursor.number("<u4"), cursor.number("<u8")
    if not all(shape):
        raise ValueError(f"the tensor {quote(name)} must have no empty axis, got the shape {shape}")
    try:
        return name, gguf.GGMLQuantizationType(number), shape, offset
    except ValueError:
        raise ValueError(f"the tensor {quote(name)} is of the unknown type {number}") from None


def quote(value: object) -> str:
    """A value from a file, for an error message: one printable line, cut if long."""
    text = ascii(value)
    return text if len(text) <= MAX_QUOTE else f"{text[:MAX_QUOTE]}..."
