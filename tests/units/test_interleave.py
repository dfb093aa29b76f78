"""The order in which the sides of a benchmark are timed."""

from __future__ import annotations

import time
from functools import partial

from benchmarks.gate import ratio_of
from benchmarks.interleave import abba, interleave, timed


def test_sides_take_turns_forwards_and_backwards() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = interleave({name: partial(side, name) for name in "abc"}, num_rounds=2)
    assert "".join(order) == "abccba"
    assert seconds == {"a": [1.0, 6.0], "b": [2.0, 5.0], "c": [3.0, 4.0]}


def test_in_pairs_a_steady_drift_cancels() -> None:
    """A machine that slows by 1% a step: one after the other every pair would say 1%, in ABBA half say so."""
    clock = iter(1.01**n for n in range(400))
    a, b = abba(lambda: next(clock), lambda: next(clock), num_pairs=200)
    ratio = ratio_of(a, b)
    assert ratio.low < 1 < ratio.high


def test_a_step_is_timed_to_its_end() -> None:
    assert timed(lambda: time.sleep(0.02))() >= 0.02
