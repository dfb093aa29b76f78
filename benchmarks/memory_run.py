"""A case's peak memory, measured in this process, beside the model's; and over many steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from .cases import Case
from .interleave import timed
from .memory import Budget, Shapes, budget_of
from .peak import Peak, measured_peak

TRIES = 10  # at a milestone


@dataclass(frozen=True)
class Held:
    """A measured peak against the model's."""

    measured: Peak
    seconds: list[float]
    shapes: Shapes
    budget: Budget

    @property
    def error(self) -> float:
        """How far the model is off, of the measured peak."""
        return self.budget.peak_bytes / self.measured.peak_bytes - 1


def held_against_model(case: Case) -> Held:
    from .contestants.ours import Ours
    from .inputs import read_inputs
    from .shapes import shapes_of

    inputs = read_inputs(case)
    shapes = shapes_of(case, inputs)
    side = Ours(inputs, case, compiled=False)
    inputs.weights.clear()
    seconds = [timed(side.step)() for _ in range(2)]  # after the second, guard.py holds two different states
    return Held(measured_peak(side.step, "mlx", case.num_windows), seconds, shapes, budget_of(shapes))


@dataclass(frozen=True)
class Milestone:
    """A stretch of steps that ends at `step`."""

    step: int
    peak: Peak
    step_seconds: float  # the median of the stretch


def long_run(case: Case, milestones: list[int], stretch: int) -> list[Milestone]:
    """Steps over batches of `stretch` different lengths; the same batches before every milestone.

    There the steps of all lengths are measured, and then a few times more: what another thread frees late
    only adds to a peak, so the least counts. The cache is never cleared, as it is not in training.
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
