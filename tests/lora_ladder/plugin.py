"""The pytest plugin that runs the rungs in order, and blocks those above a failed rung.

A rung is the number in a test file's name. Tests marked `alone` are never blocked, because they are given the
reference's values at their rung's boundary.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.lora_ladder.here import DEFAULT_TRAINER, FOLDER
from tests.lora_ladder.here import rung_of as rung_of
from tests.lora_ladder.outcome import Claim, Failure, claim_of, is_divergence, place_of, reason_of
from tests.lora_ladder.protocol import OPTIONAL

NOT_CLAIMED = "not claimed: "
OF_DIALECT = "the dialect says "
MARKERS = (
    "alone: judged even when a lower rung failed",
    "needs(*capabilities): not claimed if the trainer lacks one of them",
    "canonical(*fields): not claimed if the dialect departs from the default in one of these fields",
    "slow: takes seconds; deselect with -m 'not slow'",
)


@dataclass(eq=False)  # hashable, because pytest keeps its plugins in sets
class Ladder:
    """One run of the ladder on one trainer."""

    trainer: str
    candidate: Any
    keep_going: bool = False
    draw: int = 0
    outcomes: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    # Rung -> the largest share of a tolerance that was used, and the tensor that used it.
    shares: dict[int, tuple[float, str]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    titles: dict[int, str] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    exit_status: int = 0
    command: str = "pytest"  # or "lora-ladder", where it runs by itself
    running: str = ""  # the claim that is judged now, or was when the climb was interrupted
    is_interrupted: bool = False

    @property
    def not_claimed(self) -> list[str]:
        return [name for name in OPTIONAL if not is_claimed(self.candidate, name)]

    @property
    def first_divergence(self) -> Failure | None:
        return min(self.failures, key=lambda failure: failure.rung, default=None)

    @property
    def nothing_was_judged(self) -> bool:
        """Tests above rung 0 (which judges the platform) ran, and none of them passed or failed."""
        of_trainer = [counts for rung, counts in self.outcomes.items() if rung > 0]
        return bool(of_trainer) and not any(counts["passed"] + counts["failed"] for counts in of_trainer)

    def replay(self, nodeid: str) -> str:
        trainer = "" if self.trainer == DEFAULT_TRAINER else f" --trainer {self.trainer}"
        draw = f" --draw {self.draw}" if self.draw else ""
        if self.command == "pytest":
            return f"pytest {nodeid!r}{trainer}{draw}"
        return f"{self.command} {self.trainer} {nodeid!r}{draw}"

    def record_share(self, nodeid: str, share: float, tensor: str) -> None:
        rung = rung_of(FOLDER / nodeid.partition("::")[0])  # by itself, it has no folder
        if rung is not None and share >= self.shares.get(rung, (-1.0, ""))[0]:
            self.shares[rung] = (share, tensor)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort by rung. Tests outside the ladder come last and keep their order."""
        items.sort(key=lambda item: 100 if (rung := rung_of(item.path)) is None else rung)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        rung = rung_of(item.path)
        if rung is None:
            return
        self.titles.setdefault(rung, item.path.stem.split("_")[2])
        self.skip_what_is_not_claimed(item)
        first = self.first_divergence
        is_blocked = first is not None and first.rung < rung and not self.keep_going
        if is_blocked and not item.get_closest_marker("alone"):
            assert first is not None
            pytest.skip(f"blocked by rung {first.rung}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid

    def pytest_runtest_logfinish(self) -> None:
        self.running = ""

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Ctrl-C or SIGTERM; not pytest's own end after a file that cannot be imported."""
        self.is_interrupted = not isinstance(excinfo.value, pytest.Session.Interrupted)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.nothing_was_judged and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self.exit_status = int(session.exitstatus)

    def skip_what_is_not_claimed(self, item: pytest.Item) -> None:
        for marker in item.iter_markers("needs"):
            for name in marker.args:
                if name in self.not_claimed:
                    pytest.skip(NOT_CLAIMED + name)
        for marker in item.iter_markers("canonical"):
            for name in marker.args:
                dialect = self.candidate.dialect
                if getattr(dialect, name) != getattr(type(dialect)(), name):
                    pytest.skip(f"{NOT_CLAIMED}{OF_DIALECT}{name} = {getattr(dialect, name)!r}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """NotImplementedError means that the trainer does not claim this."""
        try:
            return (yield)
        except NotImplementedError as error:
            if rung_of(item.path) is None:
                raise
            pytest.skip(f"{NOT_CLAIMED}{error or 'NotImplementedError'}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        rung = rung_of(item.path)
        if rung is not None and (call.when == "call" or report.outcome != "passed"):
            self.record(rung, item, call, report)
        return report

    def record(
        self, rung: int, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
    ) -> None:
        if hasattr(report, "wasxfail"):
            kind = "known failures"
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            kind = next((k for k in ("not claimed", "blocked") if k in reason), "skipped")
        else:
            kind = report.outcome
        self.outcomes[rung][kind] += 1
        self.claims.append(claim_of(rung, item, kind, call, report))
        if kind == "failed" and call.excinfo is not None:
            # A strict xfail that passes has no exception, and blocks nothing.
            place, is_error = place_of(call.excinfo, self.candidate), not is_divergence(call.excinfo)
            self.failures.append(Failure(rung, item.nodeid, reason_of(call.excinfo), place, is_error))


def is_claimed(candidate: Any, name: str) -> bool:
    """A subclass withdraws a capability by setting it to None."""
    return getattr(candidate, name, None) is not None
