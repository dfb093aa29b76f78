"""What a link of a signature says where it cannot be followed: the paragraph that explains the trap.

A trap is a test in the repository, and its docstring explains it. Where the ladder is installed by itself,
hatch_build.py has put these docstrings into the folder `traps`.
"""

from __future__ import annotations

from pathlib import Path

from tests.lora_ladder.here import FOLDER, IS_INSTALLED


def seen(link: str) -> str:
    """ "see" and the link, or the trap's explanation where only that is at hand."""
    note = FOLDER / "traps" / f"{Path(link).stem}.txt"
    return paragraph(note.read_text(encoding="utf-8")) if IS_INSTALLED and note.is_file() else f"see {link}"


def paragraph(docstring: str) -> str:
    """The first sentence and the paragraph after it, as one line."""
    return " ".join(" ".join(docstring.split("\n\n")[:2]).split())
