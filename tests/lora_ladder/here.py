"""Where the ladder is: in its repository, or installed by itself, without MLX."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PACKAGE = __name__.rpartition(".")[0]
IS_INSTALLED = PACKAGE == "lora_ladder"
TRAINERS = "lora_ladder.trainers" if IS_INSTALLED else "tests.trainers"

OWN = {} if IS_INSTALLED else {"mlx_impl": "MlxTrainer", "plain": "PlainTrainer"}
# Short name -> module:Class.
ALIASES = {name: f"{TRAINERS}.mlx_impl:{kind}" for name, kind in OWN.items()}
ALIASES["reference"] = f"{TRAINERS}.reference:ReferenceTrainer"
DEFAULT_TRAINER = next(iter(ALIASES.values()))
