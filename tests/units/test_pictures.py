"""The pictures of the documents: up to date, and legible on a light and on a dark page."""

from __future__ import annotations

import re
from functools import cache
from itertools import combinations
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from benchmarks.pictures.__main__ import PICTURES, picture_path
from benchmarks.pictures.svg import COLORS, SMALLEST, WIDTH, Picture

SVG = "{http://www.w3.org/2000/svg}"
NO_TEXT = {"gray", "line"}  # colors of bars and rules


class Box(NamedTuple):
    """Where a text is, in pixels, set in DejaVu Sans: the widest of the fonts that a browser may take."""

    words: str
    left: float
    right: float
    top: float
    bottom: float


@cache
def text_width(words: str, size: float, family: str, weight: str) -> float:
    font = FontProperties(family=family, weight=weight, size=size)
    return float(TextToPath().get_text_width_height_descent(words, font, False)[0])


def box_of(text: ElementTree.Element) -> Box:
    words, classes = text.text or "", text.attrib["class"].split()
    x, y, size = (float(text.attrib[name]) for name in ("x", "y", "font-size"))
    family = "DejaVu Sans Mono" if "mono" in classes else "DejaVu Sans"
    width = text_width(words, size, family, "bold" if "bold" in classes else "normal")
    left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[text.attrib["text-anchor"]]
    return Box(words, left, left + width, y - 0.75 * size, y + 0.2 * size)


def are_apart(a: Box, b: Box) -> bool:
    return a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top


@pytest.fixture(params=PICTURES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(name: str) -> ElementTree.Element:
    return ElementTree.parse(picture_path(name)).getroot()


def test_the_file_is_what_the_script_draws(name: str) -> None:
    drawn, file = PICTURES[name](), picture_path(name).read_text(encoding="utf-8")
    assert drawn == file, "draw it again: python -m benchmarks.pictures"


def test_texts_are_large_enough_at_the_width_of_a_page(root: ElementTree.Element) -> None:
    assert float(root.attrib["width"]) == WIDTH
    assert min(float(text.attrib["font-size"]) for text in root.iter(f"{SVG}text")) >= SMALLEST


def test_no_text_is_cut_off(root: ElementTree.Element) -> None:
    height = float(root.attrib["height"])
    boxes = map(box_of, root.iter(f"{SVG}text"))
    assert [b for b in boxes if b.left < 0 or b.right > WIDTH or b.top < 0 or b.bottom > height] == []


def test_no_two_texts_overlap(root: ElementTree.Element) -> None:
    boxes = [box_of(text) for text in root.iter(f"{SVG}text")]
    assert [(a.words, b.words) for a, b in combinations(boxes, 2) if not are_apart(a, b)] == []


def test_every_class_is_in_the_style_sheet_of_both_color_schemes(root: ElementTree.Element) -> None:
    light, dark = (root.findtext(f"{SVG}style") or "").split("@media (prefers-color-scheme:dark)")
    used = {c for element in root.iter() for c in element.attrib.get("class", "").split()}
    assert used and all(f".{c}{{" in light for c in used)
    assert all(f".{c}{{" in dark for c in used - {"mono", "bold"})


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(part, 16) / 255 for part in re.findall("..", color[1:])]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme: int) -> None:
    """4.5 : 1 on the page, and so also of text in the page's color on a filled shape."""
    page = luminance(COLORS["page"][scheme])
    for color in COLORS.keys() - NO_TEXT - {"page"}:
        low, high = sorted((page, luminance(COLORS[color][scheme])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, color


def test_a_text_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 11\.0 pixels, got 10"):
        Picture(100, "a title", "a description").text(0, 0, "small", size=10)
