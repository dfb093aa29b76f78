"""Step time and memory beside other trainers, on the same arrays, within the committed ratios."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from benchmarks.bars import BARS, PEAK_SLACK, Bar
from benchmarks.cases import CASES
from benchmarks.conftest import Record
from benchmarks.contestants import CONTESTANTS
from benchmarks.gate import judge
from benchmarks.interleave import abba
from benchmarks.measure import Run, measure, opened, warm_up
from benchmarks.table import as_json
from benchmarks.worker import call, is_gpu

NUM_STEPS = 20


@cache
def runs_on_a_gpu() -> bool:
    return bool(call(is_gpu))


def names_of(case: str) -> list[str]:
    """The installed trainers that the bars of a case name."""
    named = [name for bar in BARS if bar.case == case for name in (bar.ours, bar.other)]
    return [name for name in dict.fromkeys(named) if CONTESTANTS[name].is_installed]


@cache
def run_of(case: str) -> Run:
    """One run per case, shared by its bars."""
    return measure(CASES[case], names_of(case), NUM_STEPS)


@pytest.fixture(params=BARS, ids=lambda bar: bar.name)
def bar(request: pytest.FixtureRequest) -> Iterator[Bar]:
    bar: Bar = request.param
    if CASES[bar.case].needs_gpu and not runs_on_a_gpu():
        pytest.skip("needs a GPU")
    for name in (bar.ours, bar.other):
        if not CONTESTANTS[name].is_installed:
            pytest.skip(f"{CONTESTANTS[name].title} is not installed: tox -e bench-peers")
    yield bar


def test_a_step_takes_at_most_the_committed_share_of_the_others(bar: Bar, record: Record) -> None:
    run = run_of(bar.case)
    first = [tuple(run.results[name].seconds for name in (bar.ours, bar.other))]

    def seconds(num_pairs: int) -> Any:
        return first.pop() if first else seconds_again(bar, num_pairs)

    verdict = judge(seconds, bar.step, NUM_STEPS)
    side = as_json(run)["sides"][bar.ours]
    record(side.pop("seconds"), **side, **verdict.record, goal=bar.step_goal)
    assert not verdict.is_failure, verdict.sentence


def seconds_again(bar: Bar, num_pairs: int) -> tuple[list[float], list[float]]:
    case = CASES[bar.case]
    with opened([bar.ours, bar.other], case) as sides:
        warm_up(sides, case)
        return abba(sides[bar.ours].seconds, sides[bar.other].seconds, num_pairs)


def test_a_peak_is_at_most_the_committed_share_of_the_others(bar: Bar, record: Record) -> None:
    if bar.peak is None:
        pytest.skip("no bar for memory")
    results = run_of(bar.case).results
    ours, other = (results[name].peak.peak_bytes for name in (bar.ours, bar.other))
    record(
        results[bar.ours].seconds, peak_bytes=ours, ratio=ours / other, at_most=bar.peak, goal=bar.peak_goal
    )
    assert ours / other <= bar.peak * PEAK_SLACK, f"{ours} bytes of {other}, allowed: {bar.peak} of them"


def test_all_trainers_get_the_same_work(record: Record) -> None:
    """The mean loss before any update is the same. Rows have no padding, which mlx-lm would count."""
    names = [n for n in ("ours", "mlx-lm", "peft", "pytorch") if CONTESTANTS[n].is_installed]
    with opened(names, CASES["small"]) as sides:
        losses = {name: side.hello.first_loss_nats for name, side in sides.items()}
        record([side.seconds() for side in sides.values()], losses=losses)
    assert list(losses.values()) == pytest.approx([losses["ours"]] * len(losses), rel=1e-5), losses
