"""Decides whether step a is slower than allowed beside step b, from paired times of one run.

The statistic is the median over pairs of log(a / b), with the percentile interval of the bootstrap (Efron
1979, "Bootstrap Methods"). Load that slows the machine slows both steps of a pair, so the ratio stays. The
gate fails only if the lower end of the interval exceeds the committed ratio times SLACK; noise widens the
interval and so fails nothing. A failure, or a limit inside the interval, is measured again with more pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Seconds = Sequence[float] | np.ndarray
Measure = Callable[[int], tuple[Seconds, Seconds]]  # number of pairs -> seconds of a and of b

SLACK = 1.10  # times the committed ratio: up to here it is no regression
CONFIDENCE = 0.95
RETRY = 3  # the second measurement has this many times the pairs


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
        """The verdict as JSON values."""
        interval = [self.ratio.low, self.ratio.high]
        pairs = self.ratio.num_pairs
        return {"ratio": self.ratio.median, "interval": interval, "pairs": pairs, "at_most": self.at_most}

    @property
    def sentence(self) -> str:
        relation = "exceeds" if self.is_failure else "is within"
        return (
            f"the ratio {self.ratio} of {self.ratio.num_pairs} pairs {relation} "
            f"the limit of at most {self.at_most:.2f}, with a slack factor of {SLACK:.2f}"
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
    """The verdict on a / b after one to three measurements.

    A failure is measured again and judged on the new pairs only. If the limit lies within the interval, more
    pairs are added to the old ones, at most twice.
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
