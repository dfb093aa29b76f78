"""Whether one step is slower than it may be beside another, told from pairs of times of one run.

The statistic is the median over pairs of log(a / b), its interval the bootstrap's percentiles (Efron 1979,
"Bootstrap Methods"). Absolute seconds are no part of it: what slows the machine slows both of a pair.
Only the lower end of the interval can fail, and only above the committed ratio times SLACK, so noise widens
the interval and fails nothing. A failure is measured once more, with more pairs, before it is believed; so
is what was too noisy to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Seconds = Sequence[float] | np.ndarray
Measure = Callable[[int], tuple[Seconds, Seconds]]  # so many pairs -> the seconds of both sides

SLACK = 1.10  # how far above the committed ratio is still no regression
CONFIDENCE = 0.95
RETRY = 3  # times as many pairs in the second measurement


@dataclass(frozen=True)
class Ratio:
    """seconds of a / seconds of b: the median over pairs, and the ends of its 95% interval."""

    median: float
    low: float
    high: float
    num_pairs: int

    def exceeds(self, at_most: float) -> bool:
        return self.low > at_most * SLACK

    def may_exceed(self, at_most: float) -> bool:
        return self.high > at_most * SLACK

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Verdict:
    ratio: Ratio
    at_most: float

    @property
    def is_failure(self) -> bool:
        return self.ratio.exceeds(self.at_most)

    @property
    def record(self) -> dict[str, object]:
        """For a program."""
        interval = [self.ratio.low, self.ratio.high]
        pairs = self.ratio.num_pairs
        return {"ratio": self.ratio.median, "interval": interval, "pairs": pairs, "at_most": self.at_most}

    @property
    def sentence(self) -> str:
        relation = "exceeds" if self.is_failure else "keeps"
        return (
            f"the ratio {self.ratio} of {self.ratio.num_pairs} pairs {relation} "
            f"at most {self.at_most:.2f}, with a slack of {SLACK:.2f}"
        )


def ratio_of(a_seconds: Seconds, b_seconds: Seconds, seed: int = 0, resamples: int = 2000) -> Ratio:
    """exp(median(log(a / b))) with its bootstrap interval; ValueError unless they are pairs of times."""
    a_N, b_N = np.asarray(a_seconds, np.float64), np.asarray(b_seconds, np.float64)
    if a_N.shape != b_N.shape or not len(a_N) or not (is_positive(a_N) and is_positive(b_N)):
        raise ValueError(f"a ratio needs pairs of positive seconds, got {a_seconds} and {b_seconds}")
    log_N = np.log(a_N / b_N)
    drawn_SN = np.random.default_rng(seed).integers(len(log_N), size=(resamples, len(log_N)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.exp(np.quantile(np.median(log_N[drawn_SN], axis=1), [tail, 1 - tail]))
    return Ratio(float(np.exp(np.median(log_N))), float(low), float(high), len(log_N))


def is_positive(seconds_N: np.ndarray) -> bool:
    return bool((np.isfinite(seconds_N) & (seconds_N > 0)).all())


def judge(measure: Measure, at_most: float, num_pairs: int) -> Verdict:
    """The verdict on a / b after one measurement, or two, or three.

    What fails is measured again, and judged on the new pairs alone. Where the limit lies within the interval
    the pairs were too few to tell: they are judged with the new ones, and once more so.
    """
    first = measure(num_pairs)
    verdict = Verdict(ratio_of(*first), at_most)
    if not verdict.ratio.may_exceed(at_most):
        return verdict
    second: Sequence[Seconds] | np.ndarray = measure(RETRY * num_pairs)
    if not verdict.is_failure:
        second = np.concatenate([first, second], axis=1)
    verdict = Verdict(ratio_of(*second), at_most)
    if verdict.is_failure or not verdict.ratio.may_exceed(at_most):
        return verdict
    third = np.concatenate([second, measure(RETRY * num_pairs)], axis=1)
    return Verdict(ratio_of(*third), at_most)
