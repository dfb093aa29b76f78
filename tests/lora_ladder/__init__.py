"""The ladder: each rung relies only on the rungs below it, so the first rung that fails is the diagnosis.

The names below are those that an adapter needs. They load on first use, so that pytest, which imports the
installed package as a plugin, stays as quick as it was.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.lora_ladder.protocol import (
        Arrays,
        Batch,
        Dialect,
        Examples,
        LoRAConfig,
        ModelConfig,
        RopeScaling,
        TrainConfig,
        Trainer,
    )

__all__ = [
    "Arrays",
    "Batch",
    "Dialect",
    "Examples",
    "LoRAConfig",
    "ModelConfig",
    "RopeScaling",
    "TrainConfig",
    "Trainer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.protocol"), name)
