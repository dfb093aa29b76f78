"""What became of each claim: passed, failed, not claimed or error are four words."""

from __future__ import annotations

import inspect
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.derived import Divergence
from tests.lora_ladder.here import FOLDER


@dataclass
class Failure:
    rung: int
    test: str
    report: str
    place: str = ""  # of an error: where in the adapter it was raised
    is_error: bool = False


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
    needs: tuple[str, ...] = ()  # capabilities


def claim_of(
    rung: int, item: pytest.Item, kind: str, call: pytest.CallInfo[None], report: pytest.TestReport
) -> Claim:
    is_error = kind == "failed" and call.excinfo is not None and not is_divergence(call.excinfo)
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    if kind == "failed" and call.excinfo is not None:
        reason = reason_of(call.excinfo)
    outcome = "error" if is_error else kind
    needs = tuple(str(name) for marker in item.iter_markers("needs") for name in marker.args)
    return Claim(rung, item.nodeid, outcome, reason.removeprefix("Skipped: "), report.duration, needs)


def is_divergence(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether the ladder asserted it: an assertion of the trainer or of its adapter is an error."""
    if isinstance(excinfo.value, Divergence | pytest.fail.Exception):
        return True
    frames = traceback.extract_tb(excinfo.tb)
    return isinstance(excinfo.value, AssertionError) and Path(frames[-1].filename).parent == FOLDER


def reason_of(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """The message of a divergence; type and message of an error."""
    text = str(excinfo.value)
    if isinstance(excinfo.value, AssertionError) and is_divergence(excinfo):
        return text
    return f"{excinfo.typename}: {text}" if text else excinfo.typename


def place_of(excinfo: pytest.ExceptionInfo[BaseException], candidate: Any) -> str:
    """File, line and function of the adapter that raised an error; "" for a divergence."""
    if is_divergence(excinfo):
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
