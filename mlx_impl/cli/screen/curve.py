"""loss.png: training and validation loss over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...disk.files import atomic_write
from ...train import StepRecord

MIN_SMOOTHED_STEPS = 100  # a shorter run is readable without smoothing
NUM_WINDOWS = 20  # windows of the moving mean that fit into the run
TRAINING, VALIDATION, BEST = "tab:blue", "tab:orange", "tab:red"
Points = Sequence[tuple[int, float]]  # (step, loss)


def save_loss_curve(records: Sequence[StepRecord], validation: Points, path: Path) -> None:
    figure = draw(records, validation)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150)


def draw(records: Sequence[StepRecord], validation: Points) -> Figure:
    """The training loss of each step, with a moving mean for a long run, and the validation loss."""
    training = finite_points([(record.step, record.loss_nats) for record in records])
    validation = finite_points(validation)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    draw_training(axes, training)
    draw_validation(axes, validation)
    axes.set_xlabel("step (optimizer updates)")
    axes.set_ylabel("loss (nats per target token)")
    axes.set_ylim(0, highest_shown([loss for _, loss in training], [loss for _, loss in validation]))
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
    is_long = len(losses) >= MIN_SMOOTHED_STEPS
    dot = "." if len(losses) == 1 else ""  # a line through one point is invisible
    faint: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if is_long else {}
    axes.plot(steps, losses, marker=dot, color=TRAINING, label="training, each step's batch", **faint)
    if is_long:
        width = len(losses) // NUM_WINDOWS
        means = moving_mean(np.array(losses), width)
        middles = moving_mean(np.array(steps), width)
        axes.plot(middles, means, color=TRAINING, label=f"training, mean of {width} steps")


def draw_validation(axes: Axes, validation: Points) -> None:
    if not validation:
        return
    unclipped: dict[str, Any] = {"clip_on": False, "zorder": 3}  # whole markers at the edges too
    axes.plot(
        *zip(*validation, strict=True), "o-", markersize=4, color=VALIDATION, label="validation", **unclipped
    )
    step, loss = min(validation, key=lambda point: point[1])
    label = f"best validation: {loss:.3f} at step {step}"
    axes.plot([step], [loss], "*", markersize=13, color=BEST, label=label, **unclipped)


def moving_mean(values_N: np.ndarray, width: int) -> np.ndarray:
    """The N - width + 1 means over `width` neighbouring values."""
    sums = np.cumsum(np.concatenate([[0.0], values_N]))
    return (sums[width:] - sums[:-width]) / width


def highest_shown(training: Sequence[float], validation: Sequence[float]) -> float:
    """Upper end of the loss axis: 10% above all validation losses and 99% of the training losses."""
    highest = [*validation, *([float(np.quantile(training, 0.99))] if training else [])]
    return 1.1 * max([*highest, 1e-3])


def finite_points(points: Points) -> Points:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]
