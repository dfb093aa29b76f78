"""The settings of a climb by itself: none of the user's, and none of this repository's, judges a trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from tests.lora_ladder.here import FOLDER

# The user's options, and plugins that he has installed: some change the order of tests, or fail on a warning.
USERS = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
ARGUMENTS = (
    *("-c", str(FOLDER / "climb.ini")),
    *("--rootdir", str(FOLDER)),
    *("--confcutdir", str(FOLDER)),  # no conftest.py of a folder above
    *("--import-mode", "append"),
)


@contextmanager
def own_settings() -> Iterator[None]:
    """Without pytest's variables and other plugins; PyTorch on one thread, because the cases are tiny."""
    others = {name: value for name, value in os.environ.items() if name not in USERS}
    num_threads = torch.get_num_threads()
    with patch.dict(os.environ, {**others, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, clear=True):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
