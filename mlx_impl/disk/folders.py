"""Folders out, whole or not at all; what a killed process left of one is removed by the next."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import named, synchronize, synchronize_folder
from .journal import Journal, remove_leftovers
from .places import real, require_new_folder


@contextmanager
def whole_folder(path: Path) -> Iterator[Unfinished]:
    """A temporary folder beside `path` to fill; it gets the name `path` when the block ends well.

    A link is followed to the empty folder that it names; what file browsers left there stays. Raises
    ValueError where there is something else of that name. OSError names a file in `path`.
    """
    require_new_folder(path)
    part = None
    try:
        target = real(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        part = Unfinished(target)
        yield part
        part.finish()
    except OSError as error:
        raise named(error, name_for(error, part, path)) from None
    finally:
        if part is not None:
            part.journal.close()


def name_for(error: OSError, part: Unfinished | None, path: Path) -> Path:
    """A file of the unfinished folder as one of `path`; `path` itself for all else."""
    name = Path(str(error.filename or path))
    return path / name.relative_to(part.path) if part and name.is_relative_to(part.path) else path


class Unfinished:
    """A folder that is being filled: every name in it comes from `file`."""

    def __init__(self, target: Path) -> None:
        self.target, self.journal = target, Journal(target)
        self.path = self.journal.folder
        try:
            self.path.mkdir()
        except OSError:
            self.journal.close()
            raise

    def file(self, name: str) -> Path:
        """The path of a file of this name, which is about to be made."""
        self.journal.add({"file": name})
        return self.path / name

    def finish(self) -> None:
        """Everything onto the disk, and then the folder's own name."""
        for path in self.path.iterdir():
            synchronize(path)
        if self.target.exists():
            self.path.chmod(stat.S_IMODE(self.target.stat().st_mode))
            for path in list(self.target.iterdir()):  # what file browsers left
                self.journal.add({"moved": path.name})
                os.replace(path, self.path / path.name)
        synchronize_folder(self.path)
        os.replace(self.path, self.target)
        synchronize_folder(self.target.parent)
