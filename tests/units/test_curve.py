"""loss.png: training and validation curves of runs of any length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl.cli.screen.curve import draw, moving_mean, save_loss_curve
from mlx_impl.train import StepRecord


def records(losses: list[float]) -> list[StepRecord]:
    return [StepRecord(n, loss, 1.0, 1e-4, 9, 9, 0.1, 1) for n, loss in enumerate(losses, 1)]


def lines(losses: list[float], validation: list[tuple[int, float]]) -> dict[str, list[list[float]]]:
    """The points of each line, by its name in the legend."""
    axes: Any = draw(records(losses), validation).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        line.get_label() for line in axes.lines
    ]
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_a_short_run_shows_every_step_and_every_validation() -> None:
    drawn = lines([3.0, 2.0, 1.0], [(0, 3.5), (2, 2.5), (3, 2.75)])
    assert drawn == {
        "training, each step's batch": [[1, 3.0], [2, 2.0], [3, 1.0]],
        "validation": [[0, 3.5], [2, 2.5], [3, 2.75]],
        "best validation: 2.500 at step 2": [[2, 2.5]],
    }


def test_a_long_run_has_a_moving_mean_too() -> None:
    drawn = lines([float(n % 2) for n in range(200)], [])
    (name,) = (name for name in drawn if "mean" in name)
    assert name == "training, mean of 10 steps"
    assert len(drawn) == 2 and drawn[name] == [[n + 5.5, 0.5] for n in range(191)]


def test_moving_mean_is_the_mean_over_each_window() -> None:
    losses = np.random.default_rng(0).normal(size=57)
    expected = [losses[start : start + 7].mean() for start in range(51)]
    np.testing.assert_allclose(moving_mean(losses, 7), expected, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 500])
@pytest.mark.parametrize("validation", [[], [(0, 2.5)], [(0, 2.5), (1, 0.0)]])
def test_a_run_of_any_length_can_be_drawn(
    tmp_path: Path, num_steps: int, validation: list[tuple[int, float]]
) -> None:
    save_loss_curve(records([2.0] * num_steps), validation, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_outlier_does_not_flatten_the_curve() -> None:
    """The loss axis covers all validation losses and 99% of the training losses."""
    axes: Any = draw(records([1.0] * 199 + [100.0]), [(0, 3.0)]).axes[0]
    assert 3.0 < axes.get_ylim()[1] < 5.0


def test_losses_that_are_not_finite_are_left_out() -> None:
    drawn = lines([3.0, math.nan, math.inf, 1.0], [(0, math.nan), (3, 2.0)])
    assert drawn["validation"] == [[3, 2.0]]
    assert drawn["training, each step's batch"] == [[1, 3.0], [4, 1.0]]
