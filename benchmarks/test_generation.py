"""An answer takes no longer than mlx-lm's, of one row and of sixteen."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.conftest import Record
from benchmarks.gate import judge
from benchmarks.generation import Setting, seconds_of
from benchmarks.worker import call

ROUNDS = 8


@pytest.mark.parametrize("rows", [1, 16])
def test_an_answer_takes_no_longer_than_the_others(rows: int, record: Record) -> None:
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed: tox -e bench-peers")
    setting = Setting("small", rows=rows, tokens=64)
    seconds: list[float] = []

    def measure(rounds: int) -> tuple[list[float], list[float]]:
        ours, theirs = call(seconds_of, setting, rounds)
        seconds.extend(ours)
        return ours, theirs

    verdict = judge(measure, 1.0, ROUNDS)
    record(seconds, **verdict.record)
    assert not verdict.is_failure, verdict.sentence
