"""The GGUF container: metadata, and where each tensor's bytes lie.

Source: ggml's GGUF specification, versions 2 and 3, little-endian. Every length is checked against the size
of the file before it is believed: the `gguf` package's own reader loops for as long as a damaged array length
says, and `mx.load` crashes the process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

STRING, ARRAY = 8, 9  # numbers of value types
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
MAX_ARRAY = 2**24  # elements; the longest that models have, the merges of a tokenizer, are under a million
MAX_SHOWN, MAX_MESSAGE = 80, 400  # characters: of a value in an error message, and of all of it


class StoredTensor(NamedTuple):
    """A tensor as the file has it."""

    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # of the values, the slowest axis first, as in NumPy
    data: np.ndarray  # bytes: a row of blocks along the last axis


class Cursor:
    """Reads forward through the bytes of a file; ValueError where it would leave them."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.offset = data, 0

    def take(self, num_bytes: int) -> np.ndarray:
        if num_bytes > self.data.size - self.offset:
            raise ValueError(
                f"{num_bytes} bytes are announced at byte {self.offset}, and the file has {self.data.size}"
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
            raise ValueError(f"the text that ends at byte {self.offset} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"{kind} at byte {self.offset} is not the number of a value type")
        kind, count = self.number("<u4"), self.number("<u8")
        if count > MAX_ARRAY:
            raise ValueError(
                f"an array at byte {self.offset} must have at most {MAX_ARRAY} values, got {count}"
            )
        if kind in SCALARS:
            return self.numbers(SCALARS[kind], count)
        if kind != STRING:
            raise ValueError(f"an array of value type {kind} at byte {self.offset} is not supported")
        return [self.text() for _ in range(count)]  # each takes 8 bytes or more, or raises


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors by name; ValueError in one sentence, without the file's name."""
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
            raise ValueError(f"the key {shown(key)} stands in it twice")
        metadata[key] = cursor.value(cursor.number("<u4"))
    return metadata, read_tensors(cursor, num_tensors, metadata.get("general.alignment", 32))


def read_tensors(cursor: Cursor, num_tensors: int, alignment: object) -> dict[str, StoredTensor]:
    """Their descriptions, one after the other, and then their bytes, apart from one another."""
    described = [read_description(cursor) for _ in range(num_tensors)]
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {shown(alignment)}")
    first = cursor.offset = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, kind, shape, offset in sorted(described, key=lambda description: description[3]):
        if name in tensors:
            raise ValueError(f"the tensor {shown(name)} stands in it twice")
        if first + offset < cursor.offset:
            raise ValueError(f"the tensor {shown(name)} overlaps another one")
        cursor.offset = first + offset
        try:
            data = cursor.take(math.prod(byte_shape := gguf.quant_shape_to_byte_shape(shape, kind)))
        except ValueError as error:
            raise ValueError(f"the tensor {shown(name)} cannot be read: {error}") from None
        tensors[name] = StoredTensor(kind, shape, data.reshape(byte_shape))
    return tensors


def read_description(cursor: Cursor) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
    """Name, type, shape and offset of a tensor."""
    name, num_axes = cursor.text(), cursor.number("<u4")
    if not 1 <= num_axes <= 4:
        raise ValueError(f"the tensor {shown(name)} must have 1 to 4 axes, got {num_axes}")
    shape = tuple(reversed(cursor.numbers("<u8", num_axes)))
    number, offset = cursor.number("<u4"), cursor.number("<u8")
    if not all(shape):
        raise ValueError(f"the tensor {shown(name)} must have no empty axis, got the shape {shape}")
    try:
        return name, gguf.GGMLQuantizationType(number), shape, offset
    except ValueError:
        raise ValueError(f"the tensor {shown(name)} is of type {number}, which is unknown") from None


def shown(value: object) -> str:
    """A value from a file for an error message: one line, printable, not long."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def one_line(message: str) -> str:
    """A message that may quote a damaged file: what is not printable is escaped, what is long is cut."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:MAX_MESSAGE])
