"""Which files of a data folder hold the training, validation and test examples.

A file may be JSON Lines, a JSON array or parquet, and in several shards, as on the Hugging Face hub.
"""

from __future__ import annotations

import re
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
# What other programs call a file: read where there is none of the first name.
NAMES = {"valid": ("valid", "validation", "val", "eval", "dev")}
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
MAX_LISTED = 8  # files that a message names


def find_files(folder: Path, name: str) -> list[Path]:
    """The file train, valid, test or control of a folder, or its shards in order; an empty list for none.

    ValueError where several have the name, or a shard is missing.
    """
    for spelling in NAMES.get(name, (name,)):
        whole = [path for suffix in SUFFIXES if (path := folder / f"{spelling}{suffix}").exists()]
        shards = shards_of(folder, spelling)
        if len(whole) + bool(shards) > 1:
            found = ", ".join(path.name for path in (*whole, *shards[:1]))
            raise ValueError(f"{folder}: must hold one {spelling} file, got {found}")
        if whole or shards:
            return whole or shards
    return []


def shards_of(folder: Path, name: str) -> list[Path]:
    """train-00000-of-00002.parquet and so on; ValueError unless each is there once."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        stem = next((path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s)), "")
        if (match := SHARD.fullmatch(stem)) and match["name"] == name:
            found[path] = int(match["number"]), int(match["count"])
    if found and sorted(found.values()) != [(n, len(found)) for n in range(len(found))]:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: must hold every shard of {name} once, got {names}")
    return list(found)


def require_files(folder: Path, name: str) -> list[Path]:
    """As `find_files`; ValueError, with what the folder holds, where there is none."""
    if files := find_files(folder, name):
        return files
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    more = f" and {len(held) - MAX_LISTED} more" if len(held) > MAX_LISTED else ""
    what = f"{', '.join(held[:MAX_LISTED])}{more}" if held else "nothing"
    endings = ", ".join(SUFFIXES)
    raise ValueError(
        f"{folder / name}.jsonl: there is no such data file (of {endings}); the folder holds {what}"
    )


def other_spellings(folder: Path, name: str) -> list[str]:
    """The names of files that are not read, because one of the first spelling is there."""
    read = find_files(folder, name)
    others = [
        path.name
        for spelling in NAMES.get(name, ())
        for suffix in SUFFIXES
        if (path := folder / f"{spelling}{suffix}").exists() and path not in read
    ]
    return others if read else []
