"""What is tried each time, and what only at night: `tox run -e nightly` sets HYPOTHESIS_PROFILE=nightly."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest


def is_nightly() -> bool:
    return os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


IS_NIGHTLY = is_nightly()


def mostly_at_night(values: Iterable[Any], each_time: int) -> list[Any]:
    """Parameters of a test: the first `each_time` are tried each time, the others at night."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if number < each_time else pytest.mark.nightly,
        )
        for number, value in enumerate(values)
    ]
