"""Files out, whole or not at all; regular files in, or one sentence on what is wrong with them."""

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

# Of this process alone. It stands in the name of each of its temporary files: who records it can tell the
# files of a process that died from all others, and from a user's.
PROCESS = secrets.token_hex(8)

LONGEST_REASON = 300  # characters
MOST_JSON_BYTES = 2**28
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# Writing.


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; the file gets its own name when the block ends well.

    Raises ValueError where `path` is there and is no regular file: a link is neither followed nor replaced.
    OSError, of a full disk for example, names `path`.
    """
    part = None
    try:
        require_replaceable(path)
        part = open_part(path)
        yield part
        synchronize(part)
        os.replace(part, path)
        part = None
        synchronize_folder(path.parent)  # the new name too
    except OSError as error:
        raise named(error, path) from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def require_replaceable(path: Path) -> None:
    """ValueError where a file cannot be written under this name without loss of something else."""
    if os.path.lexists(path) and not is_regular(path):
        kind = "a link" if path.is_symlink() else kind_of(path.stat().st_mode)
        raise ValueError(f"{path}: a file is to be written here, and this is {kind}: move it away")


def open_part(path: Path) -> Path:
    """A new, empty file beside `path`; its name ends as that of `path` does, by which some writers go."""
    while True:
        part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.{PROCESS}.part{path.suffix}")
        try:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return part
        except FileExistsError:
            continue


def remove_parts_of(folder: Path, process: str) -> None:
    """Remove the temporary files that a process, which is dead, left in this folder, not in those below."""
    part = re.compile(rf"\..*\.[0-9a-f]{{8}}\.{re.escape(process)}\.part(\.[^.]*)?", re.DOTALL)
    for path in list(folder.iterdir()):
        if part.fullmatch(path.name) and is_regular(path):
            path.unlink(missing_ok=True)


def named(error: OSError, path: Path) -> OSError:
    """The same error of a file with this name, not of the temporary one."""
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


def synchronize(path: Path) -> None:
    """Wait until it is on the disk, so that a power cut finds it there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def synchronize_folder(path: Path) -> None:
    """The names in it, where the system can."""
    if os.name == "posix":
        synchronize(path)


# Reading.


def is_regular(path: Path) -> bool:
    """A regular file of this very name, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def kind_of(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "something else")


def require_file(path: Path, most_bytes: int | None = None) -> None:
    """ValueError for what is no regular file, or link to one, or larger: to open a pipe may wait for ever."""
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: must be a regular file, and is {kind_of(found.st_mode)}")
    if most_bytes is not None and found.st_size > most_bytes:
        raise ValueError(f"{path}: must have at most {most_bytes} bytes, and has {found.st_size}")


def read_bytes(path: Path, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """All of a regular file; ValueError in one sentence where there is none, or a larger one."""
    require_file(path, most_bytes)
    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if len(content) > most_bytes:  # it grew, or lies about its size
        raise ValueError(f"{path}: must have at most {most_bytes} bytes, and has more")
    return content


def read_text(path: Path, most_bytes: int = MOST_JSON_BYTES) -> str:
    """As `read_bytes`; ValueError too for what is not UTF-8."""
    try:
        return read_bytes(path, most_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text: {error.reason}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where there is no file, no JSON or no object."""
    content = read_bytes(path)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=with_printable_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def with_printable_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys can stand in a message."""
    for key, _ in pairs:
        if not key.isprintable():
            raise ValueError(f"the keys of an object must be printable, got {key!r}")
    return dict(pairs)


def one_line(error: object) -> str:
    """A library's error, or a text from a file, as part of a sentence: one printable line, cut if long.

    White space becomes single spaces and what is not printable is escaped; without any text it is its repr.
    """
    text = " ".join(str(error).split()) or repr(error)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: LONGEST_REASON + 1])
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} ..."
