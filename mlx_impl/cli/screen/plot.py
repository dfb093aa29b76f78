"""A small line plot for report.html: curves in inline SVG, their labels in HTML.

The SVG is stretched to the page's width, so that a plot fits a phone and a desk; labels keep their size, and
lines their weight. Coordinates go from 0 to WIDTH and from 0 (top) to HEIGHT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .markup import Html, element

WIDTH, HEIGHT = 1000, 400  # units of the SVG
NUM_TICKS = 5
MAX_POINTS = 1000  # of a curve: more are not seen
Points = Sequence[tuple[float, float]]


class Curve(NamedTuple):
    kind: str  # its class in the style sheet, which gives it a color
    name: str  # in the legend
    points: Points
    has_dots: bool = False


class Axes(NamedTuple):
    """The largest step and the largest value; both axes begin at 0."""

    last: float
    top: float

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        step, value = point
        return WIDTH * step / self.last, HEIGHT * (1 - min(value, self.top) / self.top)


def plot(curves: Sequence[Curve], axes: Axes, title: str, height: int) -> Html:
    """A figure of so many pixels' height, with a legend where there are several curves."""
    lines = [element("line", class_="grid", x1=0, x2=WIDTH, y1=y, y2=y) for y in rows(axes)]
    drawn = [part for curve in curves for part in draw(curve, axes)]
    svg = element(
        "svg",
        element("title", f"{title}: {'; '.join(map(describe, curves))}"),
        lines,
        drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
    )
    across = [label(value, "x", 100 * value / axes.last) for value in ticks(axes.last) if value <= axes.last]
    up = [label(value, "y", 100 * (1 - value / axes.top)) for value in ticks(axes.top)]
    legend = [element("span", curve.name, class_=f"key {curve.kind}") for curve in curves]
    return element(
        "figure",
        element("figcaption", element("strong", title), legend if len(curves) > 1 else ""),
        element("div", svg, across, up, class_="plot", style=f"height:{height}px"),
    )


def draw(curve: Curve, axes: Axes) -> list[Html]:
    points = [axes.place(point) for point in thinned(curve.points)]
    parts = []
    if len(points) > 1:
        parts.append(element("path", class_=f"curve {curve.kind}", d=path(points)))
    if curve.has_dots or len(points) == 1:  # a line of no length with round ends is a dot
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        parts.append(element("path", class_=f"dots {curve.kind}", d=dots))
    return parts


def path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def thinned(points: Points) -> Points:
    """At most about MAX_POINTS of the points, the first and the last among them."""
    stride = -(-len(points) // MAX_POINTS) if points else 1
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def describe(curve: Curve) -> str:
    first, last = curve.points[0][1], curve.points[-1][1]
    return f"{curve.name} from {first:.4g} to {last:.4g}"


def ticks(top: float) -> list[float]:
    """Round numbers from 0 to `top`, about NUM_TICKS of them."""
    rough = top / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(int(top / step + 1e-9) + 1)]


def rows(axes: Axes) -> list[float]:
    return [round(axes.place((0, value))[1], 1) for value in ticks(axes.top)]


def label(value: float, axis: str, percent: float) -> Html:
    side = "left" if axis == "x" else "top"
    return element("span", f"{value:.4g}", class_=f"tick {axis}", style=f"{side}:{percent:.2f}%")
