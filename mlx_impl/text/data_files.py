"""Data files to raw rows: JSON Lines or a JSON array, plain or in gzip, and parquet.

The first bytes of a file tell its kind, not its name. JSON is read line by line, an array as a whole.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..disk.files import MAX_JSON_BYTES, one_line, require_file
from .conversation import is_text

MAX_LINE_BYTES = 2**23  # more than a million tokens
PARQUET_START, GZIP_START, LFS_START = b"PAR1", b"\x1f\x8b", b"version https://git-lfs"

RawRow = tuple[str, Any]  # "file:line", and the row's value or the ValueError of a line that cannot be read


def raw_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a data file in order; ValueError where the file as a whole cannot be read."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such data file")
    require_file(path)
    with open(path, "rb") as file:
        start = file.read(len(LFS_START))
        file.seek(0)
        if start == LFS_START:
            raise ValueError(f"{path}: is a Git LFS pointer and not the data: fetch it with git lfs pull")
        if start.startswith(PARQUET_START):
            yield from parquet_rows(path)
        elif start.startswith(GZIP_START):
            yield from gzip_rows(path, file)
        else:
            yield from json_rows(path, file)


def gzip_rows(path: Path, file: IO[bytes]) -> Iterator[RawRow]:
    try:
        with gzip.open(file) as unpacked:
            yield from json_rows(path, unpacked)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: must be a whole gzip file: {one_line(error)}") from None


def json_rows(path: Path, file: IO[bytes] | gzip.GzipFile) -> Iterator[RawRow]:
    """The values of JSON Lines or, where the first character is [, the items of an array."""
    number, is_first = 0, True
    while raw := file.readline(MAX_LINE_BYTES + 1):  # bytes: only "\n" ends a line, and a lone "\r" does not
        number += 1
        where = f"{path}:{number}"
        if is_first and raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from array_items(path, number, raw + file.read(MAX_JSON_BYTES + 1))
            return
        if len(raw) > MAX_LINE_BYTES:
            raise ValueError(f"{where}: a line must have at most {MAX_LINE_BYTES} bytes, got more")
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield where, ValueError(f"must be UTF-8 text: {error.reason}")
            continue
        if line.strip():
            if is_first:
                require_no_whole_object(path, line, file)
            is_first = False
            yield where, value_of(line)


def value_of(line: str) -> Any:
    """The JSON value of a line, or the ValueError that says why there is none."""
    try:
        value = json.loads(line)
        is_whole = "\\u" not in line or is_text(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        return ValueError(f"must be valid JSON: {error}")
    return value if is_whole else ValueError("texts must be valid Unicode, got half a surrogate pair")


def require_no_whole_object(path: Path, line: str, file: IO[bytes] | gzip.GzipFile) -> None:
    """ValueError where the first line only begins an object, and the whole file is that object."""
    if not isinstance(value_of(line), ValueError):
        return
    here = file.tell()
    rest = file.read(MAX_JSON_BYTES).decode("utf-8", "replace")
    file.seek(here)
    whole = value_of(line + rest) if rest.strip() else None
    if isinstance(whole, dict):
        keys = one_line(", ".join(map(repr, whole)))
        raise ValueError(f"{path}: must be JSON Lines or a JSON array of rows, got one object with {keys}")


def array_items(path: Path, line_number: int, raw: bytes) -> Iterator[RawRow]:
    """The items of a JSON array, each with the line on which it begins."""
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: a JSON array must have at most {MAX_JSON_BYTES} bytes: use JSON Lines")
    text = whole_text(path, raw)
    decoder, seen = json.JSONDecoder(), 0
    at = skip_space(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line_number, seen = line_number + text.count("\n", seen, at), at
        where = f"{path}:{line_number}"
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: must be valid JSON: {one_line(error)}") from None
        yield where, value_of(text[at:end])
        at = skip_space(text, end)
        if text[at : at + 1] not in (",", "]"):
            raise ValueError(f"{where}: must be valid JSON: after an item of the array must come , or ]")
        if text[at] == "," and text[(at := skip_space(text, at + 1)) :][:1] == "]":
            raise ValueError(f"{where}: must be valid JSON: after the last item of the array must come ]")
    if text[at + 1 :].strip():
        raise ValueError(f"{path}: must end after its JSON array, and does not")


def whole_text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text: {error.reason}") from None


def skip_space(text: str, at: int) -> int:
    """The position of the next character that is no white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def parquet_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a parquet file; where they are is the number of the row, from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path}: parquet is read by pyarrow: pip install ".[parquet]"') from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: must be a parquet file: {one_line(error)}") from None
