"""Prints how many mutants were planted, caught, and caught at the right rung, at the end of the run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.trainers.mutants import MUTANTS


@dataclass
class Tally:
    """The counts of one run."""

    planted: int = 0
    caught: int = 0
    at_the_right_rung: int = 0

    def count(self, is_right: bool | None) -> None:
        """`is_right` says whether the mutant was caught at the right rung; None: it was not caught."""
        self.planted += 1
        self.caught += is_right is not None
        self.at_the_right_rung += is_right is True

    def __str__(self) -> str:
        return (
            f"mutants: {self.planted} of {len(MUTANTS)} planted, {self.caught} caught, "
            f"{self.at_the_right_rung} at the right rung"
        )


TALLY = pytest.StashKey[Tally]()


@pytest.fixture
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash.setdefault(TALLY, Tally())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tally = terminalreporter.config.stash.get(TALLY, None)
    if tally is not None:
        terminalreporter.line(str(tally))
