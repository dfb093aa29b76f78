"""A damaged file loads or is refused in one sentence: no traceback, hang, crash or huge allocation.

GGUF files have their own test. Each target runs in a separate process, since a damaged file might crash it;
the last line of its output is then the case, and `python -m tests.fuzz TARGET FOLDER CASE` replays it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS
from tests.nightly import IS_NIGHTLY, mostly_at_night

ROOT = Path(__file__).resolve().parents[2]
TIMES = 1 if IS_NIGHTLY else 0.3  # as many cases as the target has
FIRST = ("config", "model", "tokenizer", "adapter", "state", "data", "data_formats", "settings")


@pytest.mark.parametrize(
    "target", mostly_at_night(sorted(TARGETS, key=lambda name: name not in FIRST), len(FIRST))
)
def test_a_damaged_file_loads_or_is_refused_in_one_sentence(target: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, str(tmp_path / target)],
        cwd=ROOT,
        env={**os.environ, "MLX_IMPL_BLAS": "off", "FUZZ_TIMES": str(TIMES)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    lines = process.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, f"{len(wrong)} cases, the first: " + "\n".join(wrong[:5])
    assert lines[-1].startswith("DONE"), (
        f"ended by {process.returncode} in {lines[-1]}: {process.stderr[-500:]}"
    )
    num_refused = int(lines[-1].split()[1])
    assert num_refused > TIMES * TARGETS[target].num_cases / 3  # otherwise the mutations damage too little


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("theirs")
    command = [sys.executable, "-m", "tests.fuzz", next(iter(TARGETS)), str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == f"error: {tmp_path}: must be a new or an empty folder, such as {tmp_path}-2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_there_are_at_least_two_thousand_cases() -> None:
    assert sum(target.num_cases for target in TARGETS.values()) >= 2000
