"""`pytest --benchmark` runs only the benchmarks; without it they are skipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OTHER = "tests/units/test_interleave.py"  # a file without benchmarks
ROOT = Path(__file__).resolve().parents[2]


def pytest_says(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.nightly  # it collects every test
def test_with_the_option_only_benchmarks_are_collected() -> None:
    tests = [line for line in pytest_says("--benchmark", "--collect-only").splitlines() if "::" in line]
    assert tests and all(test.startswith("benchmarks/") for test in tests)


def test_without_the_option_benchmarks_are_skipped() -> None:
    summary = pytest_says("benchmarks", OTHER).splitlines()[-1]
    assert "skipped" in summary and "3 passed" in summary and "failed" not in summary


def test_the_option_refuses_parallel_tests() -> None:
    assert "leave -n out" in pytest_says("--benchmark", "-n", "2", "benchmarks")
