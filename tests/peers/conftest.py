"""Ignore warnings that the libraries cause themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the matrices are tiny: threads would only slow them down


@pytest.fixture(autouse=True)
def ignore_deprecations_between_peers() -> Iterator[None]:
    """PEFT still reads an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
