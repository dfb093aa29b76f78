"""Choose and lock the folder of a run.

A new run needs a new or empty folder or, with `--overwrite`, that of a finished run. Of the finished run only
files that it wrote itself are removed (manifest.py). Nothing else is ever removed or overwritten.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...disk.output_folder import free_folder, is_free, is_junk
from . import lock, manifest
from .lock import InUse, locked
from .manifest import FILES, Digests, is_unchanged

DEFAULT = Path("adapters")


@contextmanager
def reserve_folder(path: Path | None, overwrite: bool) -> Iterator[Path]:
    """Lock a folder for a new run: `path`, or the first free folder where that is None.

    Raises ValueError, which suggests a free folder, where a run may not start.
    """
    if path is None:
        with reserve_first_free() as folder:
            yield folder
        return
    if lock.read(path / lock.NAME) is None:  # check before locked() writes its file into the folder
        require_available(path, overwrite)
    with locked(path):
        require_available(path, overwrite)
        yield path


@contextmanager
def reserve_first_free() -> Iterator[Path]:
    """Lock the first of adapters, adapters-2, ... that is new or empty and not locked by another process."""
    for number in itertools.count(1):
        path = DEFAULT if number == 1 else DEFAULT.with_name(f"{DEFAULT.name}-{number}")
        if not is_free(path):
            continue
        try:
            with locked(path):
                require_available(path, overwrite=False)
                yield path
                return
        except InUse:
            continue


@contextmanager
def reserve_to_resume(path: Path) -> Iterator[Path]:
    """Lock the folder of a stopped run."""
    manifest.read(path)
    with locked(path):
        if manifest.read(path).finished is not None:
            raise ValueError(
                f"{path}: the run to resume must be unfinished, but it is finished: "
                f"to train on from its adapter, start a new run with --init-adapter {path}"
            )
        manifest.remove_previous_run(path)
        manifest.require_own_files(path)
        yield path


def require_available(folder: Path, overwrite: bool) -> None:
    """ValueError, which suggests a free folder, unless a new run may start here."""
    alternative = f"choose another folder, such as {free_folder(folder)}"
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise ValueError(f"{folder}: must be a folder: {alternative}")
        return
    is_our_lock = lock.read(folder / lock.NAME) is not None
    found = [
        p.name for p in sorted(folder.iterdir()) if not (is_junk(p) or (is_our_lock and p.name == lock.NAME))
    ]
    if not found:
        return
    try:
        finished = manifest.read(folder).finished
    except ValueError:
        raise ValueError(f"{folder}: must be new or empty, but holds {found[0]}: {alternative}") from None
    if finished is None:
        raise ValueError(
            f"{folder}: holds an unfinished run: resume it with --resume {folder}, or {alternative}"
        )
    if not overwrite:
        raise ValueError(f"{folder}: holds a finished run: replace it with --overwrite, or {alternative}")
    require_replaceable_run(folder, found, finished, alternative)


def require_replaceable_run(folder: Path, found: list[str], finished: Digests, alternative: str) -> None:
    """ValueError where the folder of a finished run is also an input, or holds a changed file of the run."""
    for name, what in (("config.json", "model"), ("train.jsonl", "data")):
        if name in found:
            raise ValueError(f"{folder / name}: a {what} folder must not hold a run: {alternative}")
    for name in FILES:
        path = folder / name
        if os.path.lexists(path) and not is_unchanged(folder, name, finished.get(name, "")):
            raise ValueError(
                f"{path}: was changed after the run wrote it, and is not overwritten: {alternative}"
            )
