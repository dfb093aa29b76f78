"""The GGUF container, byte by byte: what the specification forbids is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mlx_impl.files.formats.gguf import read_gguf
from mlx_impl.files.formats.gguf_file import read_container

U32, F32 = 4, 0  # a value type, a tensor type
Key = tuple[str, int, bytes]
TensorInfo = tuple[str, list[int], int, int]  # name, axes from the fastest, type, offset
ONE: TensorInfo = ("a", [2, 3], F32, 0)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write(
    path: Path,
    keys: list[Key] | None = None,
    tensors: list[TensorInfo] | None = None,
    version: int = 3,
    data: int = 96,
) -> Path:
    """A file whose tensor bytes are 0, 1, 2, ... from a multiple of 32 on."""
    keys, tensors = keys or [], [ONE] if tensors is None else tensors
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    head += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in keys)
    for name, axes, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)
    path.write_bytes(head + bytes(-len(head) % 32) + np.arange(data, dtype=np.uint8).tobytes())
    return path


def test_a_tensor_is_read_at_its_offset_with_its_fastest_axis_last(tmp_path: Path) -> None:
    _, tensors = read_container(write(tmp_path / "a.gguf", tensors=[("a", [2, 3], F32, 32)]))
    assert tensors["a"].shape == (3, 2)
    np.testing.assert_array_equal(tensors["a"].data.ravel(), np.arange(32, 56))


def test_the_files_own_alignment_is_used(tmp_path: Path) -> None:
    key = ("general.alignment", U32, struct.pack("<I", 8))
    path = write(tmp_path / "a.gguf", keys=[key], data=24)
    assert read_container(path)[1]["a"].data.size == 24


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([("k", U32, b"abcd"), ("k", U32, b"abcd")], "the key 'k' appears twice"),
        ([("k", 13, b"")], "the value type at byte .* is unknown, got 13"),
        (
            [("k", 9, struct.pack("<IQ", 9, 1))],
            "the array at byte .* has elements of value type 9, which is not supported",
        ),
        (
            [("k", 8, struct.pack("<Q", 3) + b"\xff\xfe\xfd")],
            "the text that ends at byte .* must be UTF-8, and is not",
        ),
        (
            [("k", 8, struct.pack("<Q", 2**63))],
            "9223372036854775808 bytes should follow byte .*, but the file has only",
        ),
        ([("general.alignment", U32, struct.pack("<I", 24))], "alignment must be a power of two, got 24"),
        ([("general.alignment", 6, struct.pack("<f", 32))], r"alignment must be a power of two, got 32\.0"),
        ([("general.alignment", U32, struct.pack("<I", 2**31))], "the tensor 'a' cannot be read"),
    ],
)
def test_invalid_metadata_is_refused(tmp_path: Path, keys: list[Key], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_container(write(tmp_path / "a.gguf", keys))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([ONE, ("a", [2], F32, 64)], "the tensor 'a' appears twice"),
        ([ONE, ("b", [2], F32, 16)], "the tensor 'b' overlaps another one"),
        ([("a", [2, 0], F32, 0)], r"the tensor 'a' must have no empty axis, got the shape \(0, 2\)"),
        ([("a", [], F32, 0)], "the tensor 'a' must have 1 to 4 axes, got 0"),
        ([("a", [1, 1, 1, 1, 1], F32, 0)], "the tensor 'a' must have 1 to 4 axes, got 5"),
        ([("a", [2], 4, 0)], "the tensor 'a' is of the unknown type 4"),
        ([("a", [31], 2, 0)], "the tensor 'a' cannot be read: .*row size .31. is not a multiple of Q4_0"),
        ([("a", [2, 3], F32, 2**62)], "the tensor 'a' cannot be read: 24 bytes should follow byte 4611"),
        ([("a", [2**40, 2**40], F32, 0)], "the tensor 'a' cannot be read: 4835703278458516698824704 bytes"),
        (
            [("\x1b]0;" + "x" * 500, [2], 99, 0)],
            r"the tensor '\\x1b\]0;x{70,80}\.\.\. is of the unknown type 99",
        ),
    ],
)
def test_an_invalid_tensor_is_refused(tmp_path: Path, tensors: list[TensorInfo], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_container(write(tmp_path / "a.gguf", tensors=tensors))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"GGU", "4 bytes should follow byte 0, but the file has only 3"),
        (b"GGML" + bytes(60), "it must begin with the letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its version must be 2 or 3, got 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its version must be 2 or 3, got 50331648"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63),
            "8 bytes should follow byte 24, but the file has only 24",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "it lacks the key 'general.architecture'"),
    ],
)
def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.gguf: not a usable GGUF file: {message}"):
        read_gguf(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.gguf: No such file or directory"):
        read_gguf(tmp_path / "a.gguf")
