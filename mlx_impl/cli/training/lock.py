"""A lock file that gives one process a folder; the system releases the lock when that process ends.

Source: flock(2). The file records the process, its host and the token (`files.PROCESS_TOKEN`) in the names
of its temporary files, so that the next process can remove exactly those after a crash.
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

from ...disk.files import PROCESS_TOKEN, remove_temporary_files

NAME = ".mlx_impl.lock"
TOKEN = re.compile(r"[0-9a-f]{16}")  # the form of PROCESS_TOKEN
MAX_BYTES = 4096


held: dict[Path, int] = {}  # file descriptors of this process's locks, by absolute folder


class InUse(ValueError):
    """Another process has locked the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process can lock the folder, which is created if it is missing.

    Afterwards the lock file is removed, and so are folders that were created here and are still empty.
    Raises InUse, which names the other process, and ValueError for a folder that cannot be written to.
    """
    created: list[Path] = []
    try:
        try:
            create_folders(folder.absolute(), created)
            descriptor = acquire(folder)
        except OSError as error:
            sentence = f"{folder}: must be a folder that can be written to: {error.strerror}"
            raise ValueError(sentence) from None
        held[folder.absolute()] = descriptor
        try:
            yield
        finally:
            del held[folder.absolute()]
            with suppress(OSError):  # the folder may be gone or read-only by now
                if is_same_file(descriptor, folder / NAME):
                    (folder / NAME).unlink()
            os.close(descriptor)
    finally:
        for path in reversed(created):
            with suppress(OSError):  # not empty
                path.rmdir()


def create_folders(folder: Path, created: list[Path]) -> None:
    """Create the folder and its missing parents; append each to `created`, also where a later one fails."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process was faster
            path.mkdir()
            created.append(path)


def acquire(folder: Path) -> int:
    """The file descriptor of the locked lock file."""
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_same_file(descriptor, path):  # else its last holder has just removed it: try again
                require_lock_file(descriptor, path)
                remove_leftovers(folder, read(path))
                write(descriptor)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InUse(f"{folder}: {holder_name(read(path))} is using this folder") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def require_lock_file(descriptor: int, path: Path) -> None:
    """ValueError for any other file, and for a hard link, because writing the lock would overwrite it."""
    if read(path) is None or os.fstat(descriptor).st_nlink > 1:
        raise ValueError(f"{path}: must be a lock file, but is another file: move it away")


def require_held(folder: Path) -> None:
    """ValueError where the locked folder was moved or replaced: new files would go into another folder."""
    descriptor = held.get(folder.absolute())
    if descriptor is not None and not is_same_file(descriptor, folder / NAME):
        raise ValueError(f"{folder}: was moved away or replaced while this process used it")


def is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def write(descriptor: int) -> None:
    record = {"host": socket.gethostname(), "process": os.getpid(), "parts": PROCESS_TOKEN}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)


def read(path: Path) -> dict[str, Any] | None:
    """The record in a lock file; {} where a crash left it empty; None for a file that is no lock file."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        text = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b"?"
        record = json.loads(text) if text else {}
    except (OSError, ValueError, RecursionError):
        return None
    return record if record == {} or is_lock_record(record) else None


def is_lock_record(record: Any) -> bool:
    """Whether `write` could have written the record."""
    if not isinstance(record, dict) or record.keys() != {"host", "process", "parts"}:
        return False
    host, process, token = (record[key] for key in ("host", "process", "parts"))
    is_host = isinstance(host, str) and host.isprintable()
    return is_host and type(process) is int and isinstance(token, str) and bool(TOKEN.fullmatch(token))


def holder_name(record: dict[str, Any] | None) -> str:
    return f"process {record['process']} on {record['host']}" if record else "another process"


def remove_leftovers(folder: Path, record: dict[str, Any] | None) -> None:
    """Remove the temporary files of the process that held the lock and has crashed."""
    for place in (folder, folder / "best"):
        if record and place.is_dir() and not place.is_symlink():
            remove_temporary_files(place, record["parts"])
