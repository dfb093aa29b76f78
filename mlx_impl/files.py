"""Files out, whole or not at all; JSON files in, or one sentence on what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_REASON = 300  # characters


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; the file gets its own name when the block ends well.

    OSError, of a full disk for example, names `path`.
    """
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield part
        synchronize(part)
        os.replace(part, path)
        if os.name == "posix":
            synchronize(path.parent)  # the new name too
    except OSError as error:
        raise named(error, path) from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it gets the name `path` when the block ends well.

    Raises ValueError where there is something of that name that is no empty folder. OSError, of a full disk
    for example, names a file in `path`.
    """
    require_new_folder(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{path.absolute().name}.part", dir=path.absolute().parent))
    try:
        part.chmod(0o755)  # mkdtemp makes it for its owner only
        yield part
        if path.exists():
            path.rmdir()
        os.replace(part, path)
        if os.name == "posix":
            synchronize(path.absolute().parent)
    except OSError as error:
        name = Path(error.filename or part)
        raise named(error, path / name.relative_to(part) if name.is_relative_to(part) else path) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_new_folder(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: must be a new or an empty folder")


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


def make_run_folder(folder: Path) -> None:
    """Make the folder and write to it; ValueError now rather than after the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder}: must be a folder that can be written to: {error.strerror}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where there is no file, no JSON or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=with_printable_keys)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
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
    """What another library says, as part of a sentence: its first line, printable and not too long."""
    line = str(error).partition("\n")[0][:LONGEST_REASON]
    return "".join(character if character.isprintable() else "?" for character in line)
