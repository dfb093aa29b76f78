"""Atomic writes of whole folders. The leftovers of a killed process are removed by the next one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import fsync_folder, fsync_path, with_filename
from .journal import Journal, remove_leftovers
from .output_folder import real_path, require_new_folder


@contextmanager
def atomic_folder(path: Path) -> Iterator[TemporaryFolder]:
    """A temporary folder beside `path` to fill, renamed to `path` when the block ends without an error.

    `path` may be an empty folder or a link to one; files of file browsers in it, such as .DS_Store, are kept.
    Raises ValueError where `path` is anything else that exists. An OSError names a file in `path`.
    """
    require_new_folder(path)
    part = None
    try:
        target = real_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        part = TemporaryFolder(target)
        yield part
        part.finish()
    except OSError as error:
        raise with_filename(error, final_name(error, part, path)) from None
    finally:
        if part is not None:
            part.journal.close()


def final_name(error: OSError, part: TemporaryFolder | None, path: Path) -> Path:
    """The error's file in `path`, if it is in the temporary folder; else `path`."""
    name = Path(str(error.filename or path))
    return path / name.relative_to(part.path) if part and name.is_relative_to(part.path) else path


class TemporaryFolder:
    """A folder under a temporary name; `file` makes the path of each file in it."""

    def __init__(self, target: Path) -> None:
        self.target, self.journal = target, Journal(target)
        self.path = self.journal.folder
        try:
            self.path.mkdir()
        except OSError:
            self.journal.close()
            raise

    def file(self, name: str) -> Path:
        """The path of a new file; its name goes into the journal before the file is created."""
        self.journal.add({"file": name})
        return self.path / name

    def finish(self) -> None:
        """Write everything through to the disk, then rename the folder."""
        for path in self.path.iterdir():
            fsync_path(path)
        if self.target.exists():
            self.path.chmod(stat.S_IMODE(self.target.stat().st_mode))
            for path in list(self.target.iterdir()):  # files of file browsers
                self.journal.add({"moved": path.name})
                os.replace(path, self.path / path.name)
        fsync_folder(self.path)
        os.replace(self.path, self.target)
        fsync_folder(self.target.parent)
