"""The journal of a temporary folder: with it the leftovers of a killed process can be found and removed.

A folder is filled under a temporary name, `.NAME.TOKEN.part`, with the journal `.NAME.TOKEN.part.journal`
beside it. The journal names the process that fills the folder, and each file before it is created. The
process holds a lock on the journal as long as it lives. The next process that writes a folder here removes
the files that a dead process's journal names, and nothing else. The journal is beside the folder, not in it,
so that the folder can be renamed before the journal is removed: a kill at any moment leaves a folder either
finished or with its journal.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import PROCESS_TOKEN, is_regular, remove_temporary_files
from .output_folder import is_junk_name

JOURNAL = re.compile(r"\..+\.[0-9a-f]{16}\.part\.journal", re.DOTALL)
MAX_NAME = 40  # characters of the final name in the temporary name
MAX_BYTES = 2**24
# Locks of another host may be invisible here: its process counts as dead after this time without a new file.
MAX_IDLE_SECONDS = 24 * 3600


class Journal:
    """Lines of JSON: the process that fills the folder, then its files. Locked while this process lives."""

    def __init__(self, target: Path) -> None:
        self.path, self.descriptor = new_journal(target)
        self.folder = self.path.with_suffix("")
        self.entries: list[dict[str, Any]] = []
        who = {"host": platform.node(), "pid": os.getpid(), "process": PROCESS_TOKEN}
        try:
            self.add({"writer": "mlx_impl", **who, "target": target.name})
        except OSError:
            self.close()
            raise

    def add(self, entry: dict[str, Any]) -> None:
        if entry not in self.entries:
            self.entries.append(entry)
            os.write(self.descriptor, f"{json.dumps(entry)}\n".encode())
            os.fsync(self.descriptor)

    def close(self) -> None:
        """Remove our files from the folder, unless it has been renamed; then remove the journal."""
        with suppress(OSError):
            remove_unfinished(self.folder, self.entries)
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def new_journal(target: Path) -> tuple[Path, int]:
    """A new journal file, open and locked; made again if another process removed it before it was locked."""
    while True:
        name = f".{target.name[:MAX_NAME]}.{secrets.token_hex(8)}.part.journal"
        path = target.with_name(name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return path, descriptor
        os.close(descriptor)


# Leftovers of a dead process.


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders of dead processes; what cannot be removed stays."""
    with suppress(OSError):
        for path in list(parent.iterdir()):
            if JOURNAL.fullmatch(path.name) and is_regular(path):
                with suppress(OSError):
                    remove_leftover(path)


def remove_leftover(journal: Path) -> None:
    descriptor = os.open(journal, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError while its process lives
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or found.st_size > MAX_BYTES:
            return
        entries = parse_entries(os.pread(descriptor, MAX_BYTES, 0))
        is_local = bool(entries) and entries[0]["host"] == platform.node()
        if found.st_size == 0 or is_local or (entries and time.time() - found.st_mtime > MAX_IDLE_SECONDS):
            remove_unfinished(journal.with_suffix(""), entries)
            journal.unlink()
    finally:
        os.close(descriptor)


def parse_entries(content: bytes) -> list[dict[str, Any]]:
    """The entries of a journal up to the first damaged line; [] unless the first line is a journal's."""
    entries: list[dict[str, Any]] = []
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not all(isinstance(value, (str, int)) for value in entry.values()):
            break
        entries.append(entry)
    keys = {"writer", "host", "pid", "process", "target"}
    return entries if entries and entries[0].keys() == keys and entries[0]["writer"] == "mlx_impl" else []


def remove_unfinished(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Remove the regular files that the journal names, then the folder if it is empty."""
    name = plain_name(str(entries[0]["target"])) if entries else ""
    if not name or not is_own_folder(folder):
        return
    target = folder.with_name(name)
    for entry in entries[1:]:
        name = plain_name(str(entry.get("file") or entry.get("moved") or ""))
        path, back = folder / name, target / name
        if not is_regular(path):
            continue
        if "file" in entry:
            path.unlink()
        elif is_junk_name(name) and is_own_folder(target) and not os.path.lexists(back):
            os.replace(path, back)
    remove_temporary_files(folder, str(entries[0]["process"]))
    with suppress(OSError):  # not empty
        folder.rmdir()


def plain_name(name: str) -> str:
    """The name if it is that of a file directly in a folder; "" for a path that leads elsewhere."""
    is_name = name == os.path.basename(name) and name not in (".", "..") and "\0" not in name
    return name if is_name else ""


def is_own_folder(folder: Path) -> bool:
    """Whether the path is a folder of this user, and not a link to one."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
