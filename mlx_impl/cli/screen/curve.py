"""loss.png: the losses of training and validation over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...disk.files import whole_file
from ...train import StepRecord

SMOOTHED_FROM = 100  # steps; fewer are told apart by eye
WINDOWS = 20  # of smoothing, in the whole run
TRAINING, VALIDATION, BEST = "tab:blue", "tab:orange", "tab:red"
Points = Sequence[tuple[int, float]]  # steps and losses


def save_loss_curve(records: Sequence[StepRecord], validation: Points, path: Path) -> None:
    figure = draw(records, validation)
    with whole_file(path) as part:
        figure.savefig(part, dpi=150)


def draw(records: Sequence[StepRecord], validation: Points) -> Figure:
    """Every step's loss, faint under their moving mean where they are many; validation, its best marked."""
    training = finite([(record.step, record.loss_nats) for record in records])
    validation = finite(validation)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    draw_training(axes, training)
    draw_validation(axes, validation)
    axes.set_xlabel("step (optimizer updates)")
    axes.set_ylabel("loss (nats per target token)")
    axes.set_ylim(0, top([loss for _, loss in training], [loss for _, loss in validation]))
    axes.set_xlim(0, max([1, *(step for step, _ in (*training, *validation))]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def draw_training(axes: Axes, training: Points) -> None:
    if not training:
        return
    steps, losses = zip(*training, strict=True)
    is_long = len(losses) >= SMOOTHED_FROM
    dot = "." if len(losses) == 1 else ""  # a line of one point is invisible
    faint: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if is_long else {}
    axes.plot(steps, losses, marker=dot, color=TRAINING, label="training, each step's batch", **faint)
    if is_long:
        width = len(losses) // WINDOWS
        means = smoothed(np.array(losses), width)
        middles = smoothed(np.array(steps), width)
        axes.plot(middles, means, color=TRAINING, label=f"training, mean of {width} steps")


def draw_validation(axes: Axes, validation: Points) -> None:
    if not validation:
        return
    whole: dict[str, Any] = {"clip_on": False, "zorder": 3}  # also at the edges
    axes.plot(
        *zip(*validation, strict=True), "o-", markersize=4, color=VALIDATION, label="validation", **whole
    )
    step, loss = min(validation, key=lambda point: point[1])
    label = f"best validation: {loss:.3f} at step {step}"
    axes.plot([step], [loss], "*", markersize=13, color=BEST, label=label, **whole)


def smoothed(values_N: np.ndarray, width: int) -> np.ndarray:
    """The means over `width` neighbours, of which there are N - width + 1."""
    sums = np.cumsum(np.concatenate([[0.0], values_N]))
    return (sums[width:] - sums[:-width]) / width


def top(training: Sequence[float], validation: Sequence[float]) -> float:
    """A tenth above all validations and all but the highest hundredth of the training losses."""
    highest = [*validation, *([float(np.quantile(training, 0.99))] if training else [])]
    return 1.1 * max([*highest, 1e-3])


def finite(points: Points) -> Points:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]
