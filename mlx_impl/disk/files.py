"""Atomic writes of files, and checked reads: only regular files, up to a size."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Unique to this process and part of the names of its temporary files. A lock file or a journal records it, so
# that after a crash exactly the dead process's files can be removed.
PROCESS_TOKEN = secrets.token_hex(8)

MAX_REASON = 300  # characters
MAX_JSON_BYTES = 2**28
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# Writing.


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to, renamed to `path` when the block ends without an error.

    Raises ValueError where `path` is a link or anything else but a regular file. An OSError, such as a full
    disk, names `path` and not the temporary file.
    """
    part = None
    try:
        require_replaceable(path)
        part = open_temporary(path)
        yield part
        fsync_path(part)
        os.replace(part, path)
        part = None
        fsync_folder(path.parent)  # makes the rename durable
    except OSError as error:
        raise with_filename(error, path) from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def require_replaceable(path: Path) -> None:
    """ValueError where writing the file would replace something else than a regular file."""
    if os.path.lexists(path) and not is_regular(path):
        kind = "a link" if path.is_symlink() else file_kind(path.stat().st_mode)
        raise ValueError(f"{path}: must be a regular file to be overwritten, but is {kind}: move it away")


def open_temporary(path: Path) -> Path:
    """A new, empty file beside `path`, with the suffix of `path`, from which some writers infer a format."""
    while True:
        part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.{PROCESS_TOKEN}.part{path.suffix}")
        try:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return part
        except FileExistsError:
            continue


def remove_temporary_files(folder: Path, process_token: str) -> None:
    """Remove the temporary files of a dead process from this folder, but not from its subfolders."""
    part = re.compile(rf"\..*\.[0-9a-f]{{8}}\.{re.escape(process_token)}\.part(\.[^.]*)?", re.DOTALL)
    for path in list(folder.iterdir()):
        if part.fullmatch(path.name) and is_regular(path):
            path.unlink(missing_ok=True)


def with_filename(error: OSError, path: Path) -> OSError:
    """The same error with `path` as its filename."""
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


def fsync_path(path: Path) -> None:
    """Wait until the file is on the disk, where a power cut cannot lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Wait until the folder's names are on the disk, on systems that support it."""
    if os.name == "posix":
        fsync_path(path)


# Reading.


def is_regular(path: Path) -> bool:
    """Whether the path is a regular file, and not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def file_kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "something else")


def require_file(path: Path, max_bytes: int | None = None) -> None:
    """ValueError for a file that is too large or not regular; a link to a regular file is fine.

    Opening a named pipe could wait forever.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: must be a regular file, but is {file_kind(found.st_mode)}")
    if max_bytes is not None and found.st_size > max_bytes:
        raise ValueError(f"{path}: must have at most {max_bytes} bytes, got {found.st_size}")


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file; ValueError for one that is missing, unreadable or too large."""
    require_file(path, max_bytes)
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if len(content) > max_bytes:  # the file grew, or its size is wrong, as under /proc
        raise ValueError(f"{path}: must have at most {max_bytes} bytes, got more")
    return content


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The content as text; ValueError also for a file that is not UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text: {error.reason}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError for a missing file, wrong JSON or another JSON value."""
    content = read_bytes(path)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=with_printable_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def with_printable_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key with control characters, which could not be shown in a message."""
    for key, _ in pairs:
        if not key.isprintable():
            raise ValueError(f"keys must be printable, got {key!r}")
    return dict(pairs)


def one_line(error: object) -> str:
    """A library's error, or a text from a file, as part of a sentence: one printable line, cut if long.

    White space becomes single spaces and what is not printable is escaped; without any text it is its repr.
    """
    text = " ".join(str(error).split()) or repr(error)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: MAX_REASON + 1])
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} ..."
