"""A case's measured peak memory beside the model's, and the peak over many steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from .cases import Case
from .interleave import timed
from .memory import Budget, Shapes, budget_of
from .peak import Peak, measured_peak

TRIES = 10  # per milestone


@dataclass(frozen=True)
class Comparison:
    """A measured peak and the model's."""

    measured: Peak
    seconds: list[float]
    shapes: Shapes
    budget: Budget

    @property
    def error(self) -> float:
        """The model's error, relative to the measured peak."""
        return self.budget.peak_bytes / self.measured.peak_bytes - 1


def compare_with_model(case: Case) -> Comparison:
    from .contestants.ours import Ours
    from .inputs import read_inputs
    from .shapes import shapes_of

    inputs = read_inputs(case)
    shapes = shapes_of(case, inputs)
    side = Ours(inputs, case, compiled=False)
    inputs.weights.clear()
    seconds = [timed(side.step)() for _ in range(2)]  # only now the rollback copy differs from the state
    return Comparison(measured_peak(side.step, "mlx", case.num_windows), seconds, shapes, budget_of(shapes))


@dataclass(frozen=True)
class Milestone:
    """The stretch of steps that ends at `step`."""

    step: int
    peak: Peak
    step_seconds: float  # the median of the stretch


def long_run(case: Case, milestones: list[int], stretch: int) -> list[Milestone]:
    """Steps over batches of `stretch` different lengths; the same batches before every milestone.

    At a milestone the stretch is measured TRIES times and the least peak counts, because memory that another
    thread frees late only adds to a peak. The cache is never cleared, as in training.
    """
    from .contestants.ours import Ours
    from .inputs import Inputs, random_weights, random_windows

    assert case.model is not None
    lengths = random.Random(0).sample(range(8, 8 * stretch + 8, 8), stretch)
    windows = [w for n in lengths for w in random_windows(replace(case, tokens=n), case.model)]
    side = Ours(Inputs(case.model, windows, random_weights(case.model)), case)
    step, found, done = timed(side.step), [], 0
    for milestone in milestones:
        for _ in range(milestone - stretch - done):
            step()
        tries = [stretch_of(step, milestone, stretch) for _ in range(TRIES)]
        found.append(min(tries, key=lambda one: one.peak.peak_bytes))
        done = milestone + (TRIES - 1) * stretch
    return found


def stretch_of(step: Callable[[], float], milestone: int, num_steps: int) -> Milestone:
    import mlx.core as mx

    mx.reset_peak_memory()
    seconds = median(step() for _ in range(num_steps))
    peak = Peak(mx.get_peak_memory(), mx.get_active_memory(), mx.get_cache_memory())
    return Milestone(milestone, peak, seconds)
