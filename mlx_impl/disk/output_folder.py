"""Checks of an output folder: it must be new or empty, and must not overlap with an input."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .files import is_regular

JUNK = (".DS_Store", ".localized", "Thumbs.db", "desktop.ini")  # files that file browsers create


def is_junk_name(name: str) -> bool:
    return name in JUNK or name.startswith("._")


def is_junk(path: Path) -> bool:
    return is_junk_name(path.name) and is_regular(path)


def is_empty(folder: Path) -> bool:
    """Whether the folder holds nothing but files of file browsers."""
    return folder.is_dir() and all(is_junk(path) for path in folder.iterdir())


def is_free(path: Path) -> bool:
    """Whether the path does not exist or is an empty folder. A broken link exists."""
    return not os.path.lexists(path) or is_empty(path)


def free_folder(path: Path) -> Path:
    """The first of PATH, PATH-2, PATH-3, ... that does not exist or is empty."""
    base = path if path.name not in ("", "..") else real_path(path)
    free, number = base, 1
    while not is_free(free):
        number += 1
        free = base.with_name(f"{base.name}-{number}") if base.name else base / str(number)
    return free


def require_new_folder(path: Path) -> None:
    if not is_free(path):
        raise ValueError(f"{path}: must be a new or an empty folder, such as {free_folder(path)}")


def require_no_overlap(path: Path, inputs: Mapping[str, Path]) -> None:
    """ValueError where the output folder is an input, contains one or lies inside one.

    `inputs` are paths by their names in the message: {"model": ...}. Links are followed.
    """
    for name, other in inputs.items():
        if overlap(path, other):
            raise ValueError(
                f"the output folder {path} must not be, contain or lie inside the {name} {other}: "
                f"choose another, such as {suggestion(path, list(inputs.values()))}"
            )


def overlap(one: Path, other: Path) -> bool:
    return is_within(one, other) or is_within(other, one)


def is_within(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or lies inside. Asks the system, which may ignore upper and lower case."""
    ancestors = (real_path(inner), *real_path(inner).parents)
    return real_path(outer) in ancestors or any(is_same(ancestor, outer) for ancestor in ancestors)


def is_same(one: Path, other: Path) -> bool:
    with suppress(OSError):  # one of them does not exist
        return os.path.samefile(one, other)
    return False


def real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a loop of links


def suggestion(path: Path, inputs: list[Path]) -> Path:
    """A free folder beside `path` or beside an input, that overlaps with no input."""
    name = path.name or "out"
    free = free_folder(path)
    for start in (path, *(real_path(other).parent / name for other in inputs)):
        free = free_folder(start)
        if not any(overlap(free, other) for other in inputs):
            break
    return free
