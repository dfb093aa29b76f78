"""Warnings of the libraries' own making are not this project's errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def peers_may_deprecate_each_other() -> Iterator[None]:
    """PEFT still reads an attribute that transformers renames."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
