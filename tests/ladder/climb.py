"""A trainer up the ladder, from Python: `climb("module:Class").first_divergence`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Container
from pathlib import Path

import pytest

from tests.ladder.plugin import Ladder, rung_of

FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if rung_of(path) is not None)
LEFT_OUT = ("cacheprovider", "faulthandler", "logging")  # an outer run of pytest has them already


class Witness:
    """Chooses the cases, and keeps what a run of pytest knows of the ladder when it ends."""

    ladder: Ladder | None = None

    def __init__(self, cases: Container[str] | None) -> None:
        self.cases = cases

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.cases is not None:
            items[:] = [item for item in items if case_of(item) in self.cases]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.ladder = session.config.pluginmanager.get_plugin("ladder")


def case_of(item: pytest.Item) -> str:
    """Untied and plain, unless its test names others."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("case", "untied") if callspec else "untied"


def climb(
    trainer: str, *options: str, rungs: Container[int] = range(100), cases: Container[str] | None = None
) -> Ladder:
    """Runs these rungs in this process, silently; with the option -x as far as the first divergence.

    `cases` are names of tests/ladder/cases.py; None stands for all.

    Raises RuntimeError with pytest's words if no test was run.
    """
    witness, output = Witness(cases), io.StringIO()
    arguments = ["--trainer", trainer, "--tb=no", *options]
    arguments += [argument for name in LEFT_OUT for argument in ("-p", f"no:{name}")]
    arguments += [str(path) for path in FILES if rung_of(path) in rungs]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        pytest.main(arguments, plugins=[witness])
    if witness.ladder is None or not witness.ladder.outcomes:
        raise RuntimeError(output.getvalue())
    return witness.ladder
