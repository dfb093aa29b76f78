"""For those who have a test suite: `pytest --lora-ladder my_adapter:MyTrainer` adds a test for each rung.

The climb runs in a process of its own when the first of these tests runs. It has its own settings, so a
warning that the suite would make an error is none. Without the option nothing is added.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

RUNGS = range(20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("lora-ladder").addoption(
        "--lora-ladder", metavar="MODULE:CLASS", help="judge this LoRA trainer, one test for each rung"
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[Any]) -> None:
    trainer = config.getoption("--lora-ladder")
    if trainer:
        climb = Climb(trainer, config.invocation_params.dir)
        items += [
            RungItem.from_parent(session, name=f"lora-ladder[rung {rung}]", climb=climb, rung=rung)
            for rung in RUNGS
        ]


class Climb:
    """A trainer, and the record of its climb once that was asked for."""

    def __init__(self, trainer: str, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.kept: dict[str, Any] = {}

    @property
    def record(self) -> dict[str, Any]:
        if not self.kept:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "climb.json"
                package = __name__.rpartition(".")[0]
                command = [sys.executable, "-m", package, self.trainer, "--json", str(file)]
                done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
                said = done.stderr.strip()
                self.kept = json.loads(file.read_text()) if file.is_file() else {"unusable": said}
        return self.kept


class RungItem(pytest.Item):
    """One rung: fails if a claim of it failed; skipped where nothing was claimed, or where it was blocked."""

    def __init__(self, *, climb: Climb, rung: int, **given: Any) -> None:
        super().__init__(**given)
        self.climb, self.rung = climb, rung

    def runtest(self) -> None:
        record = self.climb.record
        if "unusable" in record:
            pytest.fail(record["unusable"], pytrace=False)
        counts: dict[str, int] = next(
            (row["counts"] for row in record["rungs"] if row["rung"] == self.rung), {}
        )
        if counts.get("failed") or counts.get("error"):
            pytest.fail("\n".join(self.reasons(record)), pytrace=False)
        if not counts.get("passed"):
            pytest.skip(", ".join(counts) or "nothing was judged")

    def reasons(self, record: dict[str, Any]) -> list[str]:
        first = record["first_divergence"]
        if first["rung"] == self.rung:
            return first["report"]
        wrong = [
            c for c in record["claims"] if c["rung"] == self.rung and c["outcome"] in ("failed", "error")
        ]
        return [f"{claim['claim']}: {claim['reason']}" for claim in wrong]

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.climb.folder, None, self.name
