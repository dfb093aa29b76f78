"""Reads and rewrites the parts of README.md and NOTES.md between `<!-- X -->` and `<!-- end X -->`."""

from __future__ import annotations

from pathlib import Path

from mlx_impl.disk.files import atomic_write

README = Path(__file__).with_name("README.md")
NOTES = README.with_name("NOTES.md")
WIDTH = 120  # columns of a document


def split(text: str, name: str) -> tuple[str, str, str]:
    """The text up to a part, the part, and the rest. ValueError unless each mark occurs exactly once."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"the text must have the marks {begin.strip()} and {end} once, in this order")
    start, stop = text.index(begin) + len(begin), text.index(end)
    return text[:start], text[start:stop], text[stop:]


def replaced(text: str, name: str, body: str) -> str:
    """The text with `body` between the marks."""
    before, _, after = split(text, name)
    return f"{before}{body.strip()}\n{after}"


def rows_of(text: str, name: str) -> list[dict[str, str]]:
    """The rows of the table in a part: heading -> cell."""
    lines = [line for line in split(text, name)[1].splitlines() if line.startswith("|")]
    headings, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(headings, row, strict=True)) for row in rows]


def write_part(name: str, body: str, path: Path = README) -> None:
    text = replaced(path.read_text(encoding="utf-8"), name, body)
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
