"""How a step's time and memory grow with one quantity at a time, the rest as in the case `small`.

The points of a curve take turns like different trainers, each in its own process.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_impl.disk.files import atomic_write

from .cases import CASES, Case
from .interleave import interleave
from .table import markdown, shown_bytes, shown_seconds
from .worker import Side

PICTURES = Path(__file__).parent / "curves"
NUM_ROUNDS = 15
BASE = CASES["small"]


@dataclass(frozen=True)
class Curve:
    name: str
    axis: str  # with its unit
    points: dict[float, Case]


@dataclass(frozen=True)
class Point:
    x: float
    step_seconds: float
    peak_bytes: int


def varied(name: str, axis: str, field: str, values: Sequence[float]) -> Curve:
    changes: list[dict[str, Any]] = [{field: value} for value in values]
    return Curve(name, axis, {x: replace(BASE, **c) for x, c in zip(values, changes, strict=True)})


CURVES = {
    curve.name: curve
    for curve in (
        varied("tokens", "tokens per row (4 rows)", "tokens", [32, 64, 128, 256, 512]),
        varied("rank", "rank of the adapter", "rank", [2, 8, 16, 32, 64]),
        varied("targets", "share of positions that are targets", "target_share", [1 / 16, 1 / 4, 1 / 2, 1.0]),
        varied("micro-batches", "micro-batches per update", "micro_batches", [1, 2, 4, 8]),
    )
}


def measure_curve(curve: Curve, num_rounds: int = NUM_ROUNDS) -> list[Point]:
    with ExitStack() as stack:
        sides = {x: stack.enter_context(Side("ours", case)) for x, case in curve.points.items()}
        turns = {str(x): side.seconds for x, side in sides.items()}
        interleave(turns, 2)
        seconds = interleave(turns, num_rounds)
        return [
            Point(x, statistics.median(seconds[str(x)]), side.peak(1).peak_bytes) for x, side in sides.items()
        ]


def table_of(curve: Curve, points: Sequence[Point]) -> str:
    rows = [(f"{p.x:g}", shown_seconds(p.step_seconds), shown_bytes(p.peak_bytes)) for p in points]
    return markdown((curve.axis, "step", "peak"), rows)


def picture(curve: Curve, folder: Path = PICTURES) -> Path:
    return folder / f"{curve.name}.png"


def draw(curve: Curve, points: Sequence[Point], folder: Path = PICTURES) -> Path:
    """Writes the chart. Axes start at zero, so proportional growth is a line through the origin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    x = [point.x for point in points]
    left.plot(x, [1000 * point.step_seconds for point in points], "o-", color="tab:blue")
    right.plot(x, [point.peak_bytes / 1e6 for point in points], "o-", color="tab:orange")
    for axes, label in ((left, "step (ms)"), (right, "peak memory (MB)")):
        axes.set(xlabel=curve.axis, ylabel=label, ylim=(0, None), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(exist_ok=True)
    path = picture(curve, folder)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=110, metadata={"Software": None})
    return path
