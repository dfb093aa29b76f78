"""`pytest --benchmark` runs and gates the benchmarks only. Without the option they are skipped.

pytest-benchmark is the harness. Its own gate (`--benchmark-compare-fail`) compares seconds of two runs and
fails on a busy machine, so it stays off. The gates are assertions on ratios within one run, and this
machine's earlier times, which warn (`--benchmark-strict` makes them fail).
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
BUSY = 0.5  # load above which other programs are using the cores

Record = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="run only the benchmarks, gated")
    group.addoption(
        "--benchmark-strict",
        action="store_true",
        help="fail if a benchmark is slower than before",
    )
    group.addoption(
        "--benchmark-new-baseline",
        action="store_true",
        help="let this run's times replace the earlier ones",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Runs before pytest-benchmark's hook, which reads these options."""
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
    """record(seconds, **extra): into the report and its JSON; warns if slower than before on this machine."""
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
    return [f"benchmarks: the load is {load:.1f}, other programs are using the cores: times will be noisy"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    slower = terminalreporter.config.stash.get(SLOWER, [])
    if slower:
        terminalreporter.section("slower than before on this machine (a warning)")
        for line in slower:
            terminalreporter.line(line)


@pytest.fixture(scope="session", autouse=True)
def baselines_are_kept(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    if BASELINES in pytestconfig.stash:
        pytestconfig.stash[BASELINES].write()
