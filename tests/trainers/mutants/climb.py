"""Runs the ladder on a mutant up to the first claim that fails, by pytest within pytest in this process.

To be quick, it runs only some claims: those on the default cases and on the cases that the mutant needs, with
AdamW where there is a choice. Of these it runs only the claims that the mutant's patches can change. To know
them, the unpatched (sound) trainer runs first, and every name that a mutant replaces records which claims
call it. A claim that never calls a replaced name passes as it did for the sound trainer. So each claim
makes all that it judges, and takes nothing of the trainer's from an earlier one (test_climb.py).
"""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import pytest

from mlx_impl.train import Loss
from tests.lora_ladder.climb import case_of
from tests.lora_ladder.here import ALIASES
from tests.lora_ladder.plugin import rung_of
from tests.trainers.mutants import MUTANTS, RUNGS, planted
from tests.trainers.mutants.mutant import Mutant

LADDER = Path(__file__).parents[2] / "lora_ladder"
QUIET = ("-q", "-x", "--no-header", "--no-summary", "--capture=no")
# Pytest plugins that the outer run has loaded already; two of them collect garbage after each run.
LEFT_OUT = (
    "cacheprovider",
    "faulthandler",
    "logging",
    "threadexception",
    "unraisableexception",
    "warnings",
)
ALWAYS = ("untied", "lora")  # cases
LONG = (
    "zero_b_equals",
    "loss_falls[",
    "distributed_as",
    "nothing_converges",
    "falls_from",
    "-sgd]",
    "[0.0-",
    "references[ModelConfig",
    "references[RopeScaling",
)

Touched = dict[str, set[str]]  # replaced name -> the claims that call it


@dataclass(frozen=True)
class Failure:
    """A claim that did not hold."""

    rung: int
    claim: str
    report: str
    times_tolerance: float | None  # infinite if the claim is to the bit, None if it has no tolerance


@dataclass
class Climb:
    """The result: how many claims passed at each rung, and the first that failed."""

    cases: Iterable[str]
    touched: set[str] | None = None  # the claims to try; None: all
    passed: Counter[int] = field(default_factory=Counter)
    failed: list[Failure] = field(default_factory=list)

    def is_wanted(self, item: pytest.Item) -> bool:
        is_quick = rung_of(item.path) in range(9) or not any(word in item.name for word in LONG)
        is_touched = self.touched is None or item.nodeid in self.touched
        return case_of(item) in (*ALWAYS, *self.cases) and is_quick and is_touched

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = filter(self.is_wanted, items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        rung = rung_of(item.path)
        assert rung is not None
        if report.failed:
            times = getattr(call.excinfo and call.excinfo.value, "times_tolerance", None)
            self.failed.append(Failure(rung, item.nodeid, report.longreprtext, times))
        elif report.when == "call" and report.passed:
            self.passed[rung] += 1
        return report


def climb(trainer: str, rungs: Iterable[int], cases: Iterable[str], touched: set[str] | None = None) -> Climb:
    recorder, rungs = Climb(cases, touched), set(rungs)
    names = None if touched is None else {Path(claim.partition("::")[0]).name for claim in touched}
    files = [path for path in sorted(LADDER.glob("test_*.py")) if rung_of(path) in rungs]
    files = [path for path in files if names is None or path.name in names]
    without = [argument for name in LEFT_OUT for argument in ("-p", f"no:{name}")]
    if files:
        pytest.main([*QUIET, "--trainer", ALIASES[trainer], *without, *map(str, files)], plugins=[recorder])
    return recorder


@contextmanager
def spied(trainer: str, touched: Touched) -> Iterator[None]:
    """Every name that any mutant replaces records the claims that call it."""
    with ExitStack() as stack:
        mutants = (mutant for mutant in MUTANTS.values() if mutant.trainer == trainer)
        names = {name for mutant in mutants for name in mutant.patches}
        for name in sorted(names, key=lambda name: -name.count(".")):  # a method before its class
            stack.enter_context(patch(name, noting(resolve_name(name), touched[name])))
        yield


def noting(original: Any, claims: set[str]) -> Any:
    if isinstance(original, property):
        return property(noting(original.fget, claims))
    if isinstance(original, Loss):
        return original._replace(to_arrays=noting(original.to_arrays, claims))

    @functools.wraps(original, updated=())
    def call(*arguments: Any, **named: Any) -> Any:
        claims.add(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
        return original(*arguments, **named)

    return call


@functools.cache
def sound(trainer: str) -> tuple[Climb, Touched]:
    """The result of the sound trainer, and which claims call which replaced name."""
    touched: Touched = defaultdict(set)
    with spied(trainer, touched):
        mutants = (mutant for mutant in planted().values() if mutant.trainer == trainer)
        result = climb(trainer, RUNGS, {case for mutant in mutants for case in mutant.cases})
    return result, touched


def first_failure_at_its_rung(mutant: Mutant) -> Failure | None:
    """The first claim of the mutant's own rung that fails."""
    with mutant.planted():
        return next(iter(climb(mutant.trainer, [mutant.rung], mutant.cases).failed), None)


def first_failure(mutant: Mutant) -> Failure | None:
    """The first claim that fails; the rungs above the mutant's own are tried last.

    What only other processes call (train_on_ranks) is called by no claim here, so all claims are tried.

    Raises RuntimeError if the sound trainer fails: its climb ended there, and what the rest calls is unknown.
    """
    result, touched = sound(mutant.trainer)
    if result.failed:
        raise RuntimeError(f"the sound {mutant.trainer} fails {result.failed[0].claim}")
    claims = set().union(*(touched[name] for name in mutant.patches)) or None
    with mutant.planted():
        for rungs in ([r for r in RUNGS if r <= mutant.rung], [r for r in RUNGS if r > mutant.rung]):
            failed = climb(mutant.trainer, rungs, mutant.cases, claims).failed
            if failed:
                return failed[0]
    return None
