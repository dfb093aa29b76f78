"""Kills of training runs at a few moments; `python -m tests.killed_runs` tries every moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.killed_runs import SCENARIOS, Bench, killed
from tests.nightly import IS_NIGHTLY, mostly_at_night

NUM_MOMENTS = 6 if IS_NIGHTLY else 2  # per scenario, spread over all its moments


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", mostly_at_night(reversed(SCENARIOS), 1))
def test_a_killed_run_loses_nothing(name: str, bench: Bench, tmp_path: Path) -> None:
    """The old run is unchanged, or the new run resumes bit-exactly."""
    whole = killed(bench, name, tmp_path / "run", at=10**6, when="before")
    assert whole.code == 0, whole.output
    for at, when in moments(len(whole.calls)):
        assert killed(bench, name, tmp_path / "run", at, when).was_killed


def moments(num_calls: int) -> Iterator[tuple[int, str]]:
    for number in range(NUM_MOMENTS):
        yield 1 + number * (num_calls - 1) // (NUM_MOMENTS - 1), ("before", "after")[number % 2]
