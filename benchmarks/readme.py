"""The parts of README.md that a command writes: what stands between `<!-- X -->` and `<!-- end X -->`."""

from __future__ import annotations

from pathlib import Path

from mlx_impl.disk.files import atomic_write

README = Path(__file__).with_name("README.md")


def replaced(text: str, name: str, body: str) -> str:
    """The text with `body` between the marks; ValueError unless each mark stands there once."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"the text must have the marks {begin.strip()} and {end} once, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}{body.strip()}\n{end}{rest.split(end)[1]}"


def write_part(name: str, body: str, path: Path = README) -> None:
    text = replaced(path.read_text(encoding="utf-8"), name, body)
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
