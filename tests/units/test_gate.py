"""The gate of the benchmarks on simulated times: what passes, what fails, and how reliably."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from benchmarks.gate import SLACK, Ratio, judge, ratio_of

TRIES = 50


def noisy_pairs(slowdown: float, seed: int, num_pairs: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of two sides on a busy machine: a shared drift, 3% of independent noise, outliers."""
    random = np.random.default_rng(seed)
    shared = np.cumsum(random.normal(0, 0.02, num_pairs))
    own = random.normal(0, 0.03, (2, num_pairs)) + random.exponential(0.3, (2, num_pairs)) * (
        random.random((2, num_pairs)) < 0.05
    )
    a, b = np.exp(shared + own)
    return slowdown * a, b


def test_the_ratio_is_the_median_of_the_pairs_and_lies_in_its_interval() -> None:
    ratio = ratio_of([2.0, 4.0, 8.0, 1.0, 3.0], [1.0, 2.0, 4.0, 2.0, 1.0])
    assert ratio.median == pytest.approx(2.0)
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.num_pairs == 5


def test_load_on_both_sides_of_a_pair_does_not_change_the_ratio() -> None:
    a, b = noisy_pairs(1.0, seed=0)
    load = np.linspace(1, 3, len(a))
    loaded, alone = ratio_of(a * load, b * load), ratio_of(a, b)
    assert astuple(loaded) == pytest.approx(astuple(alone))


def test_the_interval_covers_the_true_ratio_nineteen_times_in_twenty() -> None:
    """Of 400 intervals 95% should, and fewer than 92% would be three standard deviations off."""
    ratios = [ratio_of(*noisy_pairs(1.3, seed), resamples=500) for seed in range(400)]
    covered = sum(ratio.low <= 1.3 <= ratio.high for ratio in ratios)
    assert covered >= 0.92 * 400


def test_more_pairs_give_a_narrower_interval() -> None:
    few, many = (ratio_of(*noisy_pairs(1.0, 0, num_pairs)) for num_pairs in (40, 640))
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_the_same_times_give_the_same_interval() -> None:
    assert ratio_of(*noisy_pairs(1.0, 3)) == ratio_of(*noisy_pairs(1.0, 3))


@pytest.mark.parametrize(("low", "is_exceeded"), [(0.5 * SLACK - 0.01, False), (0.5 * SLACK + 0.01, True)])
def test_only_the_lower_end_decides(low: float, is_exceeded: bool) -> None:
    assert Ratio(median=0.7, low=low, high=0.9, num_pairs=20).exceeds(0.5) is is_exceeded


def test_equal_sides_fail_in_none_of_50_tries_and_fifteen_percent_in_each() -> None:
    def verdict(slowdown: float, try_: int) -> bool:
        seeds = iter(range(1000 * try_, 1000 * try_ + 2))
        return judge(lambda n: noisy_pairs(slowdown, next(seeds), n), at_most=1.0, num_pairs=60).is_failure

    assert sum(verdict(1.0, try_) for try_ in range(TRIES)) == 0
    assert sum(verdict(1.15, try_) for try_ in range(TRIES)) == TRIES


def test_a_failure_is_measured_again_and_the_second_measurement_decides() -> None:
    asked: list[int] = []

    def measure(num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(num_pairs)
        return noisy_pairs(2.0 if len(asked) == 1 else 1.0, len(asked), num_pairs)

    verdict = judge(measure, at_most=1.0, num_pairs=20)
    assert asked == [20, 60] and not verdict.is_failure and verdict.ratio.num_pairs == 60


def test_an_undecided_ratio_gets_more_pairs() -> None:
    """The ratio alternates between 0.9 and 1.3, so the interval of ten pairs spans the limit."""
    asked: list[int] = []

    def measure(num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(num_pairs)
        return (np.tile([0.9, 1.3], 5) if len(asked) == 1 else np.full(num_pairs, 1.3)), np.ones(num_pairs)

    verdict = judge(measure, at_most=1.0, num_pairs=10)
    assert asked == [10, 30] and verdict.ratio.num_pairs == 40 and verdict.is_failure


def test_a_pass_is_not_measured_again() -> None:
    asked: list[int] = []

    def measure(num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(num_pairs)
        return noisy_pairs(1.0, 0, num_pairs)

    assert not judge(measure, at_most=1.0, num_pairs=20).is_failure and asked == [20]


def test_a_verdict_states_the_measured_and_the_allowed_ratio() -> None:
    verdict = judge(lambda n: noisy_pairs(2.0, 0, n), at_most=1.0, num_pairs=20)
    assert verdict.is_failure
    assert "2.0" in verdict.sentence and "at most 1.00" in verdict.sentence and "60 pairs" in verdict.sentence


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([float("nan")], [1.0])])
def test_only_pairs_of_positive_seconds_are_accepted(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="pairs of positive seconds"):
        ratio_of(a, b)


def test_a_ratio_undecided_after_two_measurements_gets_a_third() -> None:
    """A burst of load in the first two makes their interval so wide that it contains the limit."""
    asked: list[int] = []

    def measure(n: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(n)
        burst_N = np.where(np.arange(n) % 2, 0.8, 1.6) if len(asked) < 3 else np.full(n, 1.15)
        return burst_N, np.ones(n)

    verdict = judge(measure, at_most=1.0, num_pairs=20)
    assert asked == [20, 60, 60] and verdict.ratio.num_pairs == 140 and verdict.is_failure
