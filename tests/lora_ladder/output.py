"""Files that the command writes: it replaces only its own, and says before a climb what it cannot write."""

from __future__ import annotations

from pathlib import Path


class OutputError(Exception):
    """One sentence: a file that cannot be written."""


def require_writable(path: Path | None, mark: str) -> None:
    """OutputError unless the path is free, or has a text that begins with `mark`, in a folder that exists."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise OutputError(f"a report must be in a folder that exists, got {path}")
    if path.is_dir():
        raise OutputError(f"a report must be a file, and {path} is a folder")
    if path.exists() and not path.read_bytes().startswith(mark.encode()):
        raise OutputError(f"a report may replace only a report, and {path} is another file")


def write(path: Path, text: str) -> None:
    """Raises OutputError."""
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from None


def write_new(path: Path, text: str) -> None:
    """Raises OutputError, also if there is something at this path."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{path} is there already, and nothing is overwritten") from None
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from None
