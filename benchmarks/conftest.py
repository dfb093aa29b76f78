"""`pytest --benchmark`: the benchmarks, gated, and nothing else. Without the option they are skipped.

pytest-benchmark is the harness; its own gate (`--benchmark-compare-fail`) compares seconds of two runs, which
a busy machine fails, so it is left off. The gates are assertions on ratios of one run, and an absolute
baseline of this machine that warns (`--benchmark-strict` makes it fail).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.baselines import Baselines, baselines_here
from benchmarks.replay import CLOCK, replay

HERE = Path(__file__).parent
BASELINES = pytest.StashKey[Baselines]()
SLOWER = pytest.StashKey[list[str]]()
BUSY = 0.5  # a load above it means that others want the cores

Record = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks alone, and gate them")
    group.addoption(
        "--benchmark-strict", action="store_true", help="fail what is slower than on this machine before"
    )
    group.addoption(
        "--benchmark-new-baseline", action="store_true", help="this machine's seconds are those of this run"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark's own, which comes last and reads these options."""
    option = config.option
    if not option.benchmark:
        option.benchmark_skip = not option.benchmark_only
        return
    if getattr(option, "numprocesses", None):
        raise pytest.UsageError("--benchmark runs one test at a time: leave -n out")
    if config.args_source is config.ArgsSource.TESTPATHS:
        config.args[:] = [str(HERE)]
    try:
        config.stash[BASELINES] = baselines_here(option.benchmark_new_baseline)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[SLOWER] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
            if not config.option.benchmark:
                item.add_marker(pytest.mark.skip(reason="a benchmark: pytest --benchmark"))


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Record:
    """record(seconds, **what else the JSON should say): into the report, and beside this machine's past."""
    config = request.config

    def record(seconds: list[float], **extra_info: object) -> None:
        replay(benchmark, seconds, **extra_info)
        sentence = config.stash[BASELINES].compare(request.node.nodeid, benchmark.stats.stats.median)
        if sentence and config.option.benchmark_strict:
            pytest.fail(sentence)
        if sentence:
            config.stash[SLOWER].append(sentence)

    return record


def pytest_report_header(config: pytest.Config) -> list[str]:
    load = os.getloadavg()[0]
    if not config.option.benchmark or load <= BUSY:
        return []
    return [f"benchmarks: the load is {load:.1f}, others want the cores; times will be of a busy machine"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    slower = terminalreporter.config.stash.get(SLOWER, [])
    if slower:
        terminalreporter.section("slower than on this machine before (a warning)")
        for line in slower:
            terminalreporter.line(line)


@pytest.fixture(scope="session", autouse=True)
def baselines_are_kept(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    if BASELINES in pytestconfig.stash:
        pytestconfig.stash[BASELINES].write()
