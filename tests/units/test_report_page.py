"""`report.html`: one file, safe with any text, with the facts of `report.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.screen.console import printable
from mlx_impl.cli.screen.markup import VOID, element
from mlx_impl.cli.screen.page import report_page
from mlx_impl.cli.screen.plot import Axes, Curve, plot, ticks
from mlx_impl.train import StepRecord
from tests.tiny_folder import conversation_line, write_folder

HOSTILE = "</td><script>alert('1')</script><img src=x onerror=\"y\"> & \x1b[2J \u202e"


class Page(HTMLParser):
    """The elements and the text of a page; it fails where an element is not closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)


def leaves(value: Any) -> Iterator[str]:
    """The texts of a JSON value."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    elif isinstance(value, str) and value:
        yield value


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data with hostile texts, in a folder of its own."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "data").mkdir()
    lines = [conversation_line(f"{n} {HOSTILE}", f"{n} <b>yes</b>", answer="<b>yes") for n in range(10)]
    for name in ("train", "valid"):
        (root / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    command = ["train", "--model", str(write_folder(root / "model<i>")), "--data", str(root / "data")]
    flags = ["--adapter-path", str(root / "run"), "--rank", "2", "--iters", "3", "--blas", "off"]
    assert main([*command, *flags]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_one_file_without_scripts_links_or_other_files(page: Page) -> None:
    names = {name for name, _ in page.elements}
    assert names.isdisjoint({"script", "link", "img", "a", "iframe", "object", "form", "base"})
    attributes = {name for _, given in page.elements for name in given}
    assert attributes.isdisjoint({"src", "href", "action", "srcset"})
    assert not any(name.startswith("on") for name in attributes)
    policy = next(given["content"] for _, given in page.elements if "http-equiv" in given)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_any_text_is_shown_as_text(page: Page) -> None:
    shown = [text for text in page.texts if "<script>" in text]
    assert len(shown) >= 10 and all('<img src=x onerror="y"> & \ufffd[2J' in text for text in shown)


def test_the_page_has_the_texts_of_report_json(run: Path, page: Page) -> None:
    """Settings, versions, paths, the command to repeat the run, questions and answers."""
    report = json.loads((run / "report.json").read_text())
    whole = "\n".join(page.texts)
    known = {"right", "wrong", "cut"}
    expected = {printable(text) for text in leaves(report)} - known
    assert [text for text in expected if text not in whole] == []
    for key, value in report["run"]["settings"].items():
        words = value if isinstance(value, list) else [{True: "yes", False: "no"}.get(value, str(value))]
        assert key in page.texts and all(str(word) in whole for word in words), key
    for name in ("loss_first", "loss_last", "valid_loss_first", "valid_loss_last"):
        assert f"{report[name]:.3f}" in whole, name


def test_the_page_follows_the_readers_color_scheme_and_width(run: Path, page: Page) -> None:
    style = (run / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "prefers-color-scheme: dark" in style and "max-width: 40rem" in style
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    used = set(re.findall(r"var\((--\w+)\)", style))
    light, dark = style.partition("@media")[0], style.partition("@media")[2].partition("* {")[0]
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_the_curves_are_drawn_at_their_values() -> None:
    """Of two steps with losses 4 and 2, up to 4: from the top left quarter to the middle right."""
    drawn = Page(plot([Curve("training", "loss", [(1, 4.0), (2, 2.0)])], Axes(2, 4.0), "t", 100))
    paths = [given["d"] for name, given in drawn.elements if name == "path"]
    assert paths == ["M500.0 0.0L1000.0 200.0"]


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (60, [0, 20, 40, 60]),
        (3e-4, [0, 1e-4, 2e-4, 3e-4]),
        (3, [0, 1, 2, 3]),
    ],
)
def test_ticks_are_round_numbers(top: float, expected: list[float]) -> None:
    assert ticks(top) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 99, 100, 5000])
def test_a_run_of_any_length_has_a_page_of_moderate_size(run: Path, steps: int) -> None:
    report = json.loads((run / "report.json").read_text())
    records = [StepRecord(n, 1 / n, 1.0, 0.0, 9, 9, 0.1, 1) for n in range(1, steps + 1)]
    source = report_page(report | {"validation": [], "valid_loss_first": None}, records)
    assert "M" in source and Page(source).elements and len(source) < 150_000


def test_an_element_escapes_text_and_attributes() -> None:
    assert element("p", "<b>", element("b", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<b>&amp;</b></p>'
    assert element("p", "\udc80\x00") == "<p>?\ufffd</p>"
