"""Where the ladder is: in its repository, or installed by itself, without MLX."""

from __future__ import annotations

import re
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


def rung_of(path: Path) -> int | None:
    """The number in the name of a test file in this folder; None for other files."""
    match = re.fullmatch(r"test_(\d\d)_\w+\.py", path.name)
    return int(match[1]) if match and path.parent.name == FOLDER.name else None


FILES = sorted(path for path in FOLDER.glob("test_*.py") if rung_of(path) is not None)
