"""Runs of the real model, in processes of their own: they load an optimized BLAS, the ladder must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    folder: Path
    output: str
    report: dict[str, Any]
    metrics: list[dict[str, Any]]


def run_module(*arguments: str) -> str:
    """What `python -m ARGUMENTS` prints; it is shown too, for `pytest -s`."""
    environment = {**os.environ, "MLX_IMPL_BLAS": os.environ.get("MLX_IMPL_BLAS", "auto")}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(folder: Path, *flags: str) -> Run:
    output = run_module("mlx_impl", "train", "--adapter-path", str(folder), *flags)
    report = json.loads((folder / "report.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Run(folder, output, report, [json.loads(line) for line in lines])


@pytest.fixture(scope="session")
def short_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty steps, six questions of each kind; the main job instead, where that is run anyway."""
    if any("main_job" in item.fixturenames for item in request.session.items):  # type: ignore[attr-defined]
        whole: Run = request.getfixturevalue("main_job")
        return whole
    return train(tmp_path_factory.mktemp("short"), "--iters", "20", "--num-questions", "6")


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`python -m mlx_impl train`, as a user runs it, with half of the questions and fewer validations."""
    return train(tmp_path_factory.mktemp("main"), "--num-questions", "10", "--steps-per-eval", "25")
