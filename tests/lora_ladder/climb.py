"""Run the ladder from Python: `climb("module:Class").first_divergence`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Container, Sequence

import pytest

from tests.lora_ladder.here import FILES as FILES
from tests.lora_ladder.here import IS_INSTALLED, rung_of
from tests.lora_ladder.plugin import Ladder
from tests.lora_ladder.settings import ARGUMENTS, own_settings

RUNGS = sorted({rung for path in FILES if (rung := rung_of(path))})  # rung 0 judges the platform
LEFT_OUT = ("cacheprovider", "faulthandler", "logging")  # an outer pytest run has loaded them already


class Recorder:
    """A pytest plugin that selects the cases and keeps the `Ladder` of the run when it ends."""

    ladder: Ladder | None = None

    def __init__(self, cases: Container[str] | None) -> None:
        self.cases = cases

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.cases is not None:
            items[:] = [item for item in items if case_of(item) in self.cases]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.ladder = session.config.pluginmanager.get_plugin("ladder")


def case_of(item: pytest.Item) -> str:
    """ "untied", with plain LoRA, unless the test is parametrized with another case."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("case", "untied") if callspec else "untied"


def climb(
    trainer: str, *options: str, rungs: Container[int] = range(100), cases: Container[str] | None = None
) -> Ladder:
    """Run these rungs silently in this process; with the option -x, stop at the first divergence.

    `cases` are names from tests/lora_ladder/cases.py; None means all of them.

    Raises RuntimeError with pytest's output if no test ran.
    """
    files = [str(path) for path in FILES if rung_of(path) in rungs]
    return run(trainer, [*options, *files], cases, by_itself=IS_INSTALLED)


def run(
    trainer: str,
    options: Sequence[str],
    cases: Container[str] | None = None,
    by_itself: bool = True,
    plugins: Sequence[object] = (),
) -> Ladder:
    """Run pytest silently; by itself, under the ladder's own settings. Raises as `climb` does."""
    recorder, output = Recorder(cases), io.StringIO()
    arguments = ["--trainer", trainer, "--tb=no", *(ARGUMENTS if by_itself else ()), *options]
    arguments += [argument for name in LEFT_OUT for argument in ("-p", f"no:{name}")]
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        own_settings() if by_itself else contextlib.nullcontext(),
    ):
        pytest.main(arguments, plugins=[recorder, *plugins])
    ladder = recorder.ladder
    if ladder is None or not (ladder.outcomes or ladder.is_interrupted):
        raise RuntimeError(output.getvalue())
    return ladder
