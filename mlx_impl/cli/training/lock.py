"""One process a folder: a lock that the system releases when its holder ends, also by a crash.

Source: flock(2). The file says which process on which host holds it, and by which name (`files.PROCESS`) its
temporary files go, so that whoever comes after a crash can remove exactly those.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...disk.files import PROCESS, remove_parts_of

NAME = ".mlx_impl.lock"
TOKEN = re.compile(r"[0-9a-f]{16}")  # as PROCESS is made
MOST_BYTES = 4096


held: dict[Path, int] = {}  # the descriptors of this process's locks, by folder


class InUse(ValueError):
    """Another process has the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process has this folder; it is made if it is missing.

    Afterwards the lock's file is gone, and so is a folder that was made here and is empty.
    Raises InUse, which says who has it, and ValueError for a folder that cannot be written to.
    """
    made: list[Path] = []
    try:
        try:
            make(folder.absolute(), made)
            descriptor = take(folder)
        except OSError as error:
            sentence = f"{folder}: must be a folder that can be written to: {error.strerror}"
            raise ValueError(sentence) from None
        held[folder.absolute()] = descriptor
        try:
            yield
        finally:
            del held[folder.absolute()]
            with suppress(OSError):  # a folder that is gone, or read-only by now
                if is_same(descriptor, folder / NAME):
                    (folder / NAME).unlink()
            os.close(descriptor)
    finally:
        for path in reversed(made):
            with suppress(OSError):  # it holds something
                path.rmdir()


def make(folder: Path, made: list[Path]) -> None:
    """Make it and what it lies in; `made` is told of each."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process was as quick
            path.mkdir()
            made.append(path)


def take(folder: Path) -> int:
    """The descriptor of the locked file."""
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_same(descriptor, path):  # else its last holder has just removed it
                require_ours(descriptor, path)
                remove_parts(folder, read(path))
                write(descriptor)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InUse(f"{folder}: {holder(read(path))} is using this folder") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def require_ours(descriptor: int, path: Path) -> None:
    """ValueError for a file that a lock would overwrite, under this name or another."""
    if read(path) is None or os.fstat(descriptor).st_nlink > 1:
        raise ValueError(f"{path}: a lock is to be here, and this is another file: move it away")


def require_held(folder: Path) -> None:
    """ValueError where the locked folder is no longer of this name: what is written would be another's."""
    descriptor = held.get(folder.absolute())
    if descriptor is not None and not is_same(descriptor, folder / NAME):
        raise ValueError(f"{folder}: was moved away or replaced while this process used it")


def is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def write(descriptor: int) -> None:
    record = {"host": socket.gethostname(), "process": os.getpid(), "parts": PROCESS}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)


def read(path: Path) -> dict[str, Any] | None:
    """What a lock's file says; {} for one that a crash left empty, None for a file that is not ours."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        text = path.read_bytes() if path.stat().st_size <= MOST_BYTES else b"?"
        record = json.loads(text) if text else {}
    except (OSError, ValueError, RecursionError):
        return None
    return record if record == {} or is_ours(record) else None


def is_ours(record: Any) -> bool:
    """Whether `write` could have written it."""
    if not isinstance(record, dict) or record.keys() != {"host", "process", "parts"}:
        return False
    host, process, parts = (record[key] for key in ("host", "process", "parts"))
    is_host = isinstance(host, str) and host.isprintable()
    return is_host and type(process) is int and isinstance(parts, str) and bool(TOKEN.fullmatch(parts))


def holder(record: dict[str, Any] | None) -> str:
    return f"process {record['process']} on {record['host']}" if record else "another process"


def remove_parts(folder: Path, record: dict[str, Any] | None) -> None:
    """What a process that ended in the middle of writing has left of its temporary files."""
    for place in (folder, folder / "best"):
        if record and place.is_dir() and not place.is_symlink():
            remove_parts_of(place, record["parts"])
