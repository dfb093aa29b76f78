"""A picture in hand-written SVG: boxes, lines and texts, readable on a light and on a dark page.

Colors are CSS classes with a value for each color scheme, so one file serves both. The background is
transparent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH = 800  # pixels of a page's column: one unit of the picture is one pixel
SMALLEST = 11.0  # pixels: no text is smaller

COLORS = {  # name -> on a light page, on a dark page; all but gray and line have a contrast of 4.5
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#57606a", "#9da7b1"),
    "gray": ("#8f98a3", "#6b7480"),  # bars
    "line": ("#c2c9d1", "#3d444d"),
    "blue": ("#0860c4", "#5ba4ff"),
    "green": ("#1a7a36", "#4cc764"),
    "orange": ("#b84400", "#ff9a4d"),
    "purple": ("#7a45d1", "#bc95ff"),
    "red": ("#c2212c", "#ff7b72"),
    "page": ("#ffffff", "#0d1117"),  # text on a filled bar
}
SANS = "system-ui,-apple-system,'Segoe UI','Helvetica Neue',Arial,sans-serif"
MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'Liberation Mono',monospace"

Point = tuple[float, float]


def style() -> str:
    """The style sheet: .f-X fills, .s-X strokes and .t-X tints with the color X."""

    def rules(scheme: int) -> str:
        return "".join(
            f".f-{name}{{fill:{values[scheme]}}}.s-{name}{{stroke:{values[scheme]};fill:none}}"
            f".t-{name}{{fill:{values[scheme]};fill-opacity:{(0.09, 0.16)[scheme]}}}"
            for name, values in COLORS.items()
        )

    fonts = f"text{{font-family:{SANS}}}.mono{{font-family:{MONO}}}.bold{{font-weight:600}}"
    return f"{fonts}\n{rules(0)}\n@media (prefers-color-scheme:dark){{{rules(1)}}}"


def number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


class Picture:
    """Collects elements; `str(picture)` is the file. The title and description serve screen readers."""

    def __init__(self, height: float, title: str, description: str) -> None:
        self.height, self.title, self.description = height, title, description
        self.elements: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str | None = None,
        tint: str | None = None,
        stroke: str | None = None,
        dashed: bool = False,
        radius: float = 6,
        weight: float = 1.2,
    ) -> None:
        """A filled or tinted rectangle, with an outline in `stroke` on top of it."""
        place = " ".join(
            f'{name}="{number(value)}"'
            for name, value in (("x", x), ("y", y), ("width", width), ("height", height), ("rx", radius))
        )
        for kind, color in (("f", fill), ("t", tint)):
            if color:
                self.elements.append(f'<rect class="{kind}-{color}" {place}/>')
        if stroke:
            dash = ' stroke-dasharray="5 4"' if dashed else ""
            self.elements.append(f'<rect class="s-{stroke}" stroke-width="{weight}"{dash} {place}/>')

    def line(
        self,
        points: Sequence[Point],
        color: str,
        *,
        weight: float = 1.6,
        dashed: bool = False,
        arrow: bool = False,
        arrow_back: bool = False,
    ) -> None:
        """A line through the points, with an arrow head at its end or at its start."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.elements.append(
            f'<polyline class="s-{color}" stroke-width="{weight}" stroke-linejoin="round"{dash}'
            f' points="{path}"/>'
        )
        if arrow:
            self.head(points[-2], points[-1], color)
        if arrow_back:
            self.head(points[1], points[0], color)

    def head(self, start: Point, end: Point, color: str, length: float = 8) -> None:
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        corners = [end] + [
            (end[0] - length * math.cos(angle + turn), end[1] - length * math.sin(angle + turn))
            for turn in (0.42, -0.42)
        ]
        path = " ".join(f"{number(x)},{number(y)}" for x, y in corners)
        self.elements.append(f'<polygon class="f-{color}" points="{path}"/>')

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        self.elements.append(
            f'<circle class="f-{color}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        color: str = "ink",
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        """One line of text; y is its baseline."""
        if size < SMALLEST:
            raise ValueError(f"a text must have at least {SMALLEST} pixels, got {size} for {words!r}")
        classes = " ".join([f"f-{color}", *(["bold"] if bold else []), *(["mono"] if mono else [])])
        self.elements.append(
            f'<text class="{classes}" x="{number(x)}" y="{number(y)}" font-size="{number(size)}"'
            f' text-anchor="{anchor}">{escape(words)}</text>'
        )

    def heading(self, words: str, below: Sequence[str] = ()) -> None:
        """The picture's title, and lines that explain it."""
        self.text(16, 28, words, size=18, bold=True)
        for row, line in enumerate(below):
            self.text(16, 50 + 18 * row, line, size=13, color="muted")

    def __str__(self) -> str:
        height = number(self.height)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
            f' viewBox="0 0 {WIDTH} {height}" role="img">'
        )
        words = f"<title>{escape(self.title)}</title>\n<desc>{escape(self.description)}</desc>"
        return "\n".join([head, words, f"<style>\n{style()}\n</style>", *self.elements, "</svg>", ""])
