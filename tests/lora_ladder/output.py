"""Files that the command writes: it replaces only its own, and says before a climb what it cannot write."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

# What a terminal obeys: a sequence that ends with a letter, one that ends with a bell or a backslash, or two
# characters (ECMA-48, sections 5.3 to 5.6).
SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]", re.DOTALL
)
OBEYED = ("Cc", "Cf")  # Unicode's control and format characters, as those that turn a text around


class OutputError(Exception):
    """One sentence: a file that cannot be written."""


def require_writable(path: Path | None, mark: str) -> None:
    """OutputError unless the path is free, or has a text that begins with `mark`, and can be written."""
    if path is None:
        return
    try:
        refuse_what_is_no_report(path, mark)
        is_there = path.exists()
        path.open("ab" if is_there else "xb").close()
        if not is_there:
            path.unlink()
    except OSError as error:
        raise unwritten(path, error) from None


def refuse_what_is_no_report(path: Path, mark: str) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"a report must be in a folder that exists, got {path}")
    if path.is_dir():
        raise OutputError(f"a report must be a file, and {path} is a folder")
    if path.exists() and not path.read_bytes().startswith(mark.encode()):
        raise OutputError(f"a report may replace only a report, and {path} is another file")


def unwritten(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} could not be written: {error.strerror}")


def printable(text: str) -> str:
    """Without what a terminal obeys; lines and tabs stay."""
    text = SEQUENCES.sub("", text)
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in OBEYED)


def write(path: Path, text: str) -> None:
    """Raises OutputError."""
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise unwritten(path, error) from None


def write_new(path: Path, text: str) -> None:
    """Raises OutputError, also if there is something at this path."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{path} is there already, and nothing is overwritten") from None
    except OSError as error:
        raise unwritten(path, error) from None
