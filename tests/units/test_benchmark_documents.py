"""The documents of the benchmarks: tables between marks, and charts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.curves import CURVES, Point, draw, table_of
from benchmarks.readme import NOTES, README, WIDTH, replaced
from benchmarks.table import markdown, shown_bytes, shown_seconds

TEXT = "a\n<!-- t -->\nold\n<!-- end t -->\nb\n"


def test_only_the_text_between_the_marks_is_replaced() -> None:
    assert replaced(TEXT, "t", "new\n") == TEXT.replace("old", "new")


@pytest.mark.parametrize("text", ["", TEXT + TEXT, "<!-- end t -->\n<!-- t -->\n"])
def test_each_mark_must_occur_exactly_once(text: str) -> None:
    with pytest.raises(ValueError, match="must have the marks"):
        replaced(text, "t", "new")


@pytest.mark.parametrize(
    ("document", "name"),
    [(README, "table"), (README, "as-installed"), (README, "memory-check"), (NOTES, "memory")],
)
def test_every_written_table_has_its_place(document: Path, name: str) -> None:
    assert "a new table" in replaced(document.read_text(encoding="utf-8"), name, "a new table")


def test_the_readme_shows_every_chart() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"(curves/{name}.png)" in text for name in CURVES)


def test_the_documents_fit_the_width_and_the_readme_is_short() -> None:
    for document in (README, NOTES):
        lines = document.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line) > WIDTH] == []
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


def test_a_curve_is_a_chart_and_a_table(tmp_path: Path) -> None:
    points = [Point(1.0, 0.01, 10**6), Point(2.0, 0.02, 2 * 10**6)]
    assert draw(CURVES["rank"], points, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert "| 2 | 20 ms | 2.0 MB |" in table_of(CURVES["rank"], points)


def test_numbers_have_units() -> None:
    assert (shown_seconds(1.234), shown_seconds(0.0123)) == ("1.23 s", "12.3 ms")
    assert (shown_bytes(2.5e9), shown_bytes(3.21e7)) == ("2.50 GB", "32.1 MB")


def test_a_markdown_table_has_a_line_below_its_headings() -> None:
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
