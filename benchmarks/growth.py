"""How many times the step time of a small case a large one takes: both in turn in one process."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import Case
from .gate import Verdict, judge
from .interleave import abba, timed

NUM_PAIRS = 20


@dataclass(frozen=True)
class Growth:
    verdict: Verdict
    seconds: list[float]  # of the larger case


def judge_growth(large: Case, small: Case, at_most: float) -> Growth:
    """Whether a step of `large` takes at most `at_most` times one of `small`."""
    from .contestants.ours import Ours
    from .inputs import read_inputs

    large_step, small_step = (timed(Ours(read_inputs(case), case).step) for case in (large, small))
    for _ in range(3):
        large_step(), small_step()
    seconds: list[float] = []

    def measure(num_pairs: int) -> tuple[list[float], list[float]]:
        of_large, of_small = abba(large_step, small_step, num_pairs)
        seconds.extend(of_large)
        return of_large, of_small

    return Growth(judge(measure, at_most, NUM_PAIRS), seconds)
