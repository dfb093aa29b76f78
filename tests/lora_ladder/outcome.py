"""What became of each claim: passed, failed, not claimed or error are four words."""

from __future__ import annotations

import inspect
import os
import traceback
from dataclasses import dataclass
from typing import Any

import pytest

from tests.lora_ladder.here import FOLDER


@dataclass
class Failure:
    rung: int
    test: str
    report: str
    place: str = ""  # of an error: where in the adapter it was raised


@dataclass(frozen=True)
class Claim:
    """A claim that was tried.

    `outcome` is "passed"; "failed", a wrong result; "error", an exception; "not claimed"; "blocked", by a
    lower rung; "skipped"; or "known failures", of the platform.
    """

    rung: int
    test: str
    outcome: str
    reason: str
    seconds: float


def claim_of(
    rung: int, item: pytest.Item, kind: str, call: pytest.CallInfo[None], report: pytest.TestReport
) -> Claim:
    is_error = kind == "failed" and call.excinfo is not None and not is_divergence(call.excinfo.value)
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    if kind == "failed" and call.excinfo is not None:
        reason = reason_of(call.excinfo)
    outcome = "error" if is_error else kind
    return Claim(rung, item.nodeid, outcome, reason.removeprefix("Skipped: "), report.duration)


def is_divergence(error: BaseException) -> bool:
    return isinstance(error, AssertionError | pytest.fail.Exception)


def reason_of(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """The message of an assertion; type and message of any other exception."""
    text = str(excinfo.value)
    return text if isinstance(excinfo.value, AssertionError) else f"{excinfo.typename}: {text}"


def place_of(excinfo: pytest.ExceptionInfo[BaseException], candidate: Any) -> str:
    """File, line and function of the adapter that raised an error; "" for a divergence."""
    if is_divergence(excinfo.value):
        return ""
    own = file_of(candidate)
    frames = [frame for frame in traceback.extract_tb(excinfo.tb) if frame.filename == own]
    if not frames:
        return ""
    path = os.path.relpath(frames[-1].filename)
    return f"{path}:{frames[-1].lineno}, in {frames[-1].name}"


def file_of(candidate: Any) -> str:
    """The source of the class; "" where there is none, or where it is the ladder's."""
    try:
        file = inspect.getfile(candidate)
    except (TypeError, OSError):
        return ""
    return "" if str(FOLDER) in file else file
