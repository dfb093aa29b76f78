"""Where a run may begin, and which run may go on.

A run begins in a folder that is new or empty, or, where that is asked for, in that of a finished run, of
which only what it wrote itself is removed (manifest.py). Nothing else is ever removed or overwritten.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...disk.places import free_folder, is_free, is_junk
from . import lock, manifest
from .lock import InUse, locked
from .manifest import FILES, is_unchanged

DEFAULT = Path("adapters")


@contextmanager
def place_for_a_run(path: Path | None, overwrite: bool) -> Iterator[Path]:
    """Within the block the folder is this process's alone; without a path it is the first that is free.

    Raises ValueError, in a sentence that names a free folder, where a run may not begin.
    """
    if path is None:
        with first_free() as folder:
            yield folder
        return
    if lock.read(path / lock.NAME) is None:  # nobody has it; so what stands here stays untouched
        require_place(path, overwrite)
    with locked(path):
        require_place(path, overwrite)
        yield path


@contextmanager
def first_free() -> Iterator[Path]:
    """adapters, adapters-2, ...: the first that is new or empty, and that no other process has."""
    for number in itertools.count(1):
        path = DEFAULT if number == 1 else DEFAULT.with_name(f"{DEFAULT.name}-{number}")
        if not is_free(path):
            continue
        try:
            with locked(path):
                require_place(path, overwrite=False)
                yield path
                return
        except InUse:
            continue


@contextmanager
def run_to_resume(path: Path) -> Iterator[Path]:
    """The folder of a run that was stopped, this process's alone within the block."""
    manifest.read(path)
    with locked(path):
        if manifest.read(path).finished is not None:
            raise ValueError(f"{path}: the run to resume must be unfinished, and is finished")
        manifest.remove_the_run_before(path)
        manifest.require_own_files(path)
        yield path


def require_place(folder: Path, overwrite: bool) -> None:
    """ValueError unless a run may begin here; it names a free folder."""
    others = f"take another folder, such as {free_folder(folder)}"
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise ValueError(f"{folder}: must be a folder: {others}")
        return
    is_ours = lock.read(folder / lock.NAME) is not None
    found = [
        p.name for p in sorted(folder.iterdir()) if not (is_junk(p) or (is_ours and p.name == lock.NAME))
    ]
    if not found:
        return
    try:
        finished = manifest.read(folder).finished
    except ValueError:
        raise ValueError(f"{folder}: must be new or empty, and holds {found[0]}: {others}") from None
    if finished is None:
        raise ValueError(
            f"{folder}: holds a run that is not finished: go on with --resume {folder}, or {others}"
        )
    if not overwrite:
        raise ValueError(f"{folder}: holds a finished run: replace it with --overwrite, or {others}")
    for name, what in (("config.json", "model"), ("train.jsonl", "data")):
        if name in found:
            raise ValueError(f"{folder / name}: a {what} folder must not hold a run: {others}")
    for name in FILES:
        place = folder / name
        if os.path.lexists(place) and not is_unchanged(folder, name, finished.get(name, "")):
            raise ValueError(f"{place}: is not as the run wrote it, and is not overwritten: {others}")
