"""The journal of a folder that is being filled, by which a killed process's folder is told from all others.

A folder is filled under a temporary name, `.NAME.TOKEN.part`. Beside it stands its journal: which process
fills it, which holds a lock on the journal for as long as it lives, and the name of every file in the folder,
written down before the file is made. So the next one that writes a folder here can tell what a dead process
left: it removes the files that the journal names, one by one, and nothing else. The journal stands beside the
folder, not in it, so that the folder can be renamed first and lose its journal afterwards: there is no moment
at which a kill would leave a folder that no journal names.
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

from .files import PROCESS, is_regular, remove_parts_of
from .places import is_junk_name

JOURNAL = re.compile(r"\..+\.[0-9a-f]{16}\.part\.journal", re.DOTALL)
LONGEST_NAME = 40  # characters of the folder's own name in the temporary one
MOST_BYTES = 2**24
LONGEST_LIFE = 24 * 3600  # seconds without a new file, of a process on another host, whose locks may not show


class Journal:
    """Lines of JSON: who fills the folder, and what is in it. Locked while this process lives."""

    def __init__(self, target: Path) -> None:
        self.path, self.descriptor = new_journal(target)
        self.folder = self.path.with_suffix("")
        self.entries: list[dict[str, Any]] = []
        who = {"host": platform.node(), "pid": os.getpid(), "process": PROCESS}
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
        """Remove what the folder, if it did not get its own name, holds of ours; the journal last."""
        with suppress(OSError):
            remove_unfinished(self.folder, self.entries)
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def new_journal(target: Path) -> tuple[Path, int]:
    """A new file, open and locked, and still there: before the lock another process may take it for left."""
    while True:
        name = f".{target.name[:LONGEST_NAME]}.{secrets.token_hex(8)}.part.journal"
        path = target.with_name(name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return path, descriptor
        os.close(descriptor)


# What a dead process left.


def remove_leftovers(parent: Path) -> None:
    """Of every unfinished folder here whose process is dead; what cannot be removed stays."""
    with suppress(OSError):
        for path in list(parent.iterdir()):
            if JOURNAL.fullmatch(path.name) and is_regular(path):
                with suppress(OSError):
                    remove_leftover(path)


def remove_leftover(journal: Path) -> None:
    descriptor = os.open(journal, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or found.st_size > MOST_BYTES:
            return
        entries = parsed(os.pread(descriptor, MOST_BYTES, 0))
        is_here = bool(entries) and entries[0]["host"] == platform.node()
        if found.st_size == 0 or is_here or (entries and time.time() - found.st_mtime > LONGEST_LIFE):
            remove_unfinished(journal.with_suffix(""), entries)
            journal.unlink()
    finally:
        os.close(descriptor)


def parsed(content: bytes) -> list[dict[str, Any]]:
    """The lines of a journal, up to one that is damaged; none unless the first is that of a journal."""
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
    """The files that the journal names, then the folder if it is empty; no link, nothing of anyone else's."""
    name = plain(str(entries[0]["target"])) if entries else ""
    if not name or not is_own_folder(folder):
        return
    target = folder.with_name(name)
    for entry in entries[1:]:
        name = plain(str(entry.get("file") or entry.get("moved") or ""))
        path, back = folder / name, target / name
        if not is_regular(path):
            continue
        if "file" in entry:
            path.unlink()
        elif is_junk_name(name) and is_own_folder(target) and not os.path.lexists(back):
            os.replace(path, back)
    remove_parts_of(folder, str(entries[0]["process"]))
    with suppress(OSError):  # not empty
        folder.rmdir()


def plain(name: str) -> str:
    """A name of a folder's own file; "" for a path that leads elsewhere."""
    is_name = name == os.path.basename(name) and name not in (".", "..") and "\0" not in name
    return name if is_name else ""


def is_own_folder(folder: Path) -> bool:
    """A folder of this user's, not a link to one."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
