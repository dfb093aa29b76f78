"""mlx-lm's adapter files in NumPy, `adapter_config.json` and `adapters.safetensors`, and mlx-lm's rules.

Sources: mlx-lm 0.32, `tuner/utils.py` (`load_adapters`, `linear_to_lora_layers`), `lora.py`, `dora.py`.
Tensors are named `<linear>.lora_a` (I, R), `.lora_b` (R, O) and with DoRA `.m` (O,). There is one rank and
one `scale`, which is the factor on A B itself: there is no alpha.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlx_impl.config import LoRAConfig
from tests.derived import Divergence
from tests.lora_ladder.peft_files import BLOCK, read_safetensors, write_safetensors
from tests.lora_ladder.protocol import Arrays

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"


def file_name(name: str) -> str:
    return name.removesuffix(".magnitude") + ".m" if name.endswith(".magnitude") else name


def our_name(name: str) -> str:
    return name.removesuffix(".m") + ".magnitude" if name.endswith(".m") else name


def record_of(
    rank: int,
    scale: float,
    dropout: float,
    num_layers: int = -1,
    keys: Sequence[str] | None = None,
    is_dora: bool = False,
) -> dict[str, Any]:
    settings: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": dropout}
    return {
        "fine_tune_type": "dora" if is_dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": settings | ({"keys": list(keys)} if keys is not None else {}),
    }


def write_adapter(folder: Path, record: dict[str, Any], factors: Arrays) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(record, indent=2), encoding="utf-8")
    write_safetensors(folder / TENSORS, {file_name(name): array for name, array in factors.items()})


def read_adapter(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """The record, and the factors by our names; Divergence for what mlx-lm could not read."""
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        settings = record["lora_parameters"]
        for name in ("rank", "scale", "dropout"):
            float(settings[name])
        int(record["num_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "must be a JSON object with num_layers and lora_parameters (rank, scale, dropout)"
        raise Divergence(f"{CONFIG} {what}: {type(error).__name__}: {error}") from None
    return record, {our_name(name): array for name, array in read_safetensors(folder / TENSORS)[0].items()}


def adapted_linears(record: dict[str, Any], linears: Iterable[str], depth: int) -> set[str]:
    """Those whose whole name is a key, and in the last `num_layers` blocks those whose path in a block is.

    0 or less means all blocks; without keys every linear of these blocks is adapted.
    """
    keys, num_layers = record["lora_parameters"].get("keys"), record["num_layers"]
    first = max(depth - num_layers, 0) if num_layers > 0 else 0
    chosen = set()
    for linear in linears:
        block = BLOCK.match(linear)
        path = linear[block.end() :] if block else None
        is_last = block is not None and int(block[1]) >= first
        if (is_last and (keys is None or path in keys)) or linear in (keys or ()):
            chosen.add(linear)
    return chosen


def config_of(record: dict[str, Any], linears: Iterable[str], depth: int) -> LoRAConfig:
    """The same adapter in our words: alpha = scale * rank, and every linear by its name."""
    settings = record["lora_parameters"]
    return LoRAConfig(
        rank=settings["rank"],
        alpha=settings["scale"] * settings["rank"],
        dropout=settings["dropout"],
        target_modules=tuple(sorted(adapted_linears(record, linears, depth))),
        use_dora=record.get("fine_tune_type") == "dora",
    )
