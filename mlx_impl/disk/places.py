"""Where a result may go: a folder that is new or empty, apart from everything that is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .files import is_regular

JUNK = (".DS_Store", ".localized", "Thumbs.db", "desktop.ini")  # that file browsers leave


def is_junk_name(name: str) -> bool:
    return name in JUNK or name.startswith("._")


def is_junk(path: Path) -> bool:
    return is_junk_name(path.name) and is_regular(path)


def is_empty(folder: Path) -> bool:
    """But for what file browsers leave."""
    return folder.is_dir() and all(is_junk(path) for path in folder.iterdir())


def is_free(path: Path) -> bool:
    """Not there, or an empty folder; a link that leads nowhere is not free."""
    return not os.path.lexists(path) or is_empty(path)


def free_folder(path: Path) -> Path:
    """The first of PATH, PATH-2, PATH-3, ... that is not there or is empty."""
    base = path if path.name not in ("", "..") else real(path)
    free, number = base, 1
    while not is_free(free):
        number += 1
        free = base.with_name(f"{base.name}-{number}") if base.name else base / str(number)
    return free


def require_new_folder(path: Path) -> None:
    if not is_free(path):
        raise ValueError(f"{path}: must be a new or an empty folder, such as {free_folder(path)}")


def require_apart(path: Path, others: Mapping[str, Path]) -> None:
    """ValueError where the folder to write is one of those that are read, contains it or lies inside it.

    `others` are paths by what they are: {"model": ...}. Links are followed.
    """
    for what, other in others.items():
        if touch(path, other):
            raise ValueError(
                f"the folder to write, {path}, must not be, contain or lie inside the {what} {other}: "
                f"choose another, such as {apart_from(path, list(others.values()))}"
            )


def touch(one: Path, other: Path) -> bool:
    return is_within(one, other) or is_within(other, one)


def is_within(inner: Path, outer: Path) -> bool:
    """Is it, or lies inside; as the system tells files apart, whatever the case of the letters."""
    places = (real(inner), *real(inner).parents)
    return real(outer) in places or any(is_same(place, outer) for place in places)


def is_same(one: Path, other: Path) -> bool:
    with suppress(OSError):  # one of them is not there
        return os.path.samefile(one, other)
    return False


def real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for links in a circle


def apart_from(path: Path, others: list[Path]) -> Path:
    """A free folder for the same purpose: beside `path`, or beside what it lies in."""
    name = path.name or "out"
    free = free_folder(path)
    for start in (path, *(real(other).parent / name for other in others)):
        free = free_folder(start)
        if not any(touch(free, other) for other in others):
            break
    return free
