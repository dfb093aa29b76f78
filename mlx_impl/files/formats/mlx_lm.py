"""mlx-lm's adapter files: `adapter_config.json` and `adapters.safetensors`.

Source: mlx-lm 0.32, `tuner/utils.py` (`load_adapters`, `linear_to_lora_layers`), `tuner/dora.py`. Names are
`<linear>.lora_a` (I, R), `.lora_b` (R, O) and with DoRA `.m` (O,). There is one rank and one scale. `keys`
selects linears by their path within a block, in the last `num_layers` blocks (in all for 0 or less), or by
their full name anywhere; without `keys` every linear of those blocks is adapted. mlx-lm ignores unknown keys
of the record, so an adapter that was converted from PEFT keeps PEFT's record under "peft".
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...config import require_choice, require_number
from ...disk.files import one_line, read_json_object
from .factors import CONFIG, AdapterFile, by_linear, read_tensors, split_block, write_files

FILE = "adapters.safetensors"
ORIGINAL_KEY = "peft"
FACTORS = {"lora_a": "lora_a", "lora_b": "lora_b", "m": "magnitude"}
SETTINGS = {"rank", "scale", "dropout", "keys"}
IGNORED = {"alpha"}  # written by older versions, which did not use it either


def file_name(name: str) -> str:
    linear, _, factor = name.rpartition(".")
    return f"{linear}.{'m' if factor == 'magnitude' else factor}"


def our_name(name: str, path: Path) -> str:
    linear, _, factor = name.rpartition(".")
    if linear.rpartition(".")[2] == "embed_tokens":
        raise ValueError(f"{path}: an adapter of an embedding is not supported, got the tensor {name}")
    if factor not in FACTORS:
        raise ValueError(f"{path}: the tensor {name} is not part of a LoRA adapter of linears")
    return f"{linear}.{FACTORS[factor]}"


def write(folder: Path, adapter: AdapterFile) -> None:
    record = adapter.record | ({ORIGINAL_KEY: adapter.original} if adapter.original else {})
    tensors = {file_name(name): array for name, array in adapter.tensors.items()}
    write_files(folder, FILE, tensors, record, {"format": "mlx"})


def read(folder: Path) -> AdapterFile:
    """The adapter in a folder; ValueError if a file is damaged or holds more than LoRA or DoRA of linears."""
    record = read_json_object(folder / CONFIG)
    original = record.pop(ORIGINAL_KEY, None)
    try:
        require_supported(record)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG}: the key {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    stored, _ = read_tensors(folder / FILE)
    tensors = {our_name(name, folder / FILE): array for name, array in stored.items()}
    try:
        require_one_rank(record, tensors)
    except ValueError as error:
        raise ValueError(f"{folder / FILE}: {error}") from None
    return AdapterFile(record, tensors, original if isinstance(original, dict) else None)


def require_supported(record: dict[str, Any]) -> None:
    require_choice("fine_tune_type", record.get("fine_tune_type", "lora"), ("lora", "dora"))
    num_layers, settings = record["num_layers"], record["lora_parameters"]
    if isinstance(num_layers, bool) or not isinstance(num_layers, int):
        raise ValueError(f"num_layers must be a whole number, got {num_layers!r}")
    if not isinstance(settings, dict):
        raise ValueError(f"lora_parameters must be an object, got {settings!r}")
    require_number("rank", settings["rank"], int)
    require_number("scale", settings["scale"], float)
    require_number("dropout", settings["dropout"], float, may_be_zero=True)
    keys = settings.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise ValueError(f"keys must be a list of names, got {keys!r}")
    for key in sorted(settings.keys() - SETTINGS - IGNORED):
        raise ValueError(f"lora_parameters may hold {', '.join(sorted(SETTINGS))}, got {key}")


def require_one_rank(record: dict[str, Any], tensors: dict[str, Any]) -> None:
    rank = record["lora_parameters"]["rank"]
    is_dora = record.get("fine_tune_type") == "dora"
    for linear, factors in by_linear(tensors).items():
        if factors["lora_a"].shape[1] != rank:
            raise ValueError(f"{linear} must have the rank {rank}, got {factors['lora_a'].shape[1]}")
        if ("magnitude" in factors) is not is_dora:
            raise ValueError(f"{linear} must have a tensor m if and only if fine_tune_type is dora")


def selected_linears(record: dict[str, Any], linears: Iterable[str], num_blocks: int) -> set[str]:
    """The linears that mlx-lm would adapt; ValueError that names a key that matches none."""
    keys, num_layers = record["lora_parameters"].get("keys"), record["num_layers"]
    first = max(num_blocks - num_layers, 0) if num_layers > 0 else 0
    chosen, unmatched = set(), set(keys or ())
    for linear in linears:
        block = split_block(linear)
        path = block[1] if block else None
        unmatched -= {linear, path}
        is_last = block is not None and block[0] >= first
        if (is_last and (keys is None or path in keys)) or (keys is not None and linear in keys):
            chosen.add(linear)
    if unmatched:
        name = one_line(min(unmatched))
        raise ValueError(f"keys must name linears in this model's blocks, and {name} is none")
    return chosen
