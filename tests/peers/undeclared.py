"""A peer on the ladder with one declared departure taken back, so that the claim that shows it fails.

    python -m tests.peers.undeclared tests.peers.adapters.mlx_lm:MlxLmTrainer pad_targets --rungs 5

What follows the field of the dialect are the arguments of `lora-ladder`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from tests.lora_ladder.command import main
from tests.lora_ladder.loading import load_trainer
from tests.lora_ladder.protocol import Dialect


def undeclared(trainer: type, field: str) -> type:
    """A subclass whose dialect has the default in this field."""
    canonical = replace(trainer.dialect, **{field: getattr(Dialect(), field)})  # type: ignore[attr-defined]
    return type("Undeclared", (trainer,), {"dialect": canonical})


if __name__ == "__main__":
    name, field, *options = sys.argv[1:]
    Undeclared = undeclared(load_trainer(name), field)
    sys.exit(main(["__main__:Undeclared", *options]))
