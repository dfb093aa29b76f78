"""Warnings of the libraries' own making are not this project's errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the matrices are tiny: threads only wait for one another


@pytest.fixture(autouse=True)
def peers_may_deprecate_each_other() -> Iterator[None]:
    """PEFT still reads an attribute that transformers renames."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
