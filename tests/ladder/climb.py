"""One trainer up the ladder, from Python: `climb("module:Class").first_divergence`."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from tests.ladder.plugin import Ladder

FOLDER = Path(__file__).parent


class Witness:
    """Keeps what a run of pytest knows of the ladder when it ends."""

    ladder: Ladder | None = None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.ladder = session.config.pluginmanager.get_plugin("ladder")


def climb(trainer: str, *options: str, marks: str = "not slow") -> Ladder:
    """Runs the rungs in this process, silently; with the option -x only as far as the first divergence.

    Raises RuntimeError with pytest's words if no test was run.
    """
    witness, output = Witness(), io.StringIO()
    arguments = [
        str(FOLDER),
        "--trainer",
        trainer,
        "-m",
        marks,
        "-p",
        "no:cacheprovider",
        "--tb=no",
        *options,
    ]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        pytest.main(arguments, plugins=[witness])
    if witness.ladder is None or not witness.ladder.outcomes:
        raise RuntimeError(output.getvalue())
    return witness.ladder
