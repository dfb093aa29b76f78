"""PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors`.

Source: PEFT's `save_pretrained` and `utils/save_and_load.py`. Its keys are `base_model.model.` + the linear's
name + `.lora_A.weight` of shape (R, I) and `.lora_B.weight` of shape (O, R), both the transpose of ours, and
with DoRA `.lora_magnitude_vector` of shape (O,). The scale is not stored; alpha and rank are. An adapter that
was converted from mlx-lm keeps mlx-lm's record in the header of the safetensors file: PEFT ignores that
header, but would warn about an unknown key in its own record.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...config import LoRAConfig
from ...disk.files import read_json_object
from .factors import CONFIG, AdapterFile, read_tensors, write_files
from .hf_keys import is_off

FILE = "adapter_model.safetensors"
ORIGINAL_KEY = "mlx_lm_adapter_config"  # in the header
PREFIX = "base_model.model."
SUFFIXES = {
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}

# Keys that are read below or do not change the model; any other must be off.
KNOWN_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "layers_pattern"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("qalora_group_size", "megatron_core"),  # set even where they are not used
}
INITIALIZATIONS = (None, True, False, "gaussian")  # the others change the base model's weights


def file_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.lora_a -> base_model.model.(the same).lora_A.weight"""
    linear, _, factor = name.rpartition(".")
    return PREFIX + linear + SUFFIXES[factor]


def our_name(name: str, path: Path) -> str:
    for factor, suffix in SUFFIXES.items():
        if name.startswith(PREFIX) and name.endswith(suffix):
            return f"{name.removeprefix(PREFIX).removesuffix(suffix)}.{factor}"
    raise ValueError(f"{path}: the tensor {name} is not part of a LoRA adapter of linears")


def write(folder: Path, adapter: AdapterFile) -> None:
    metadata = {"format": "pt"} | ({ORIGINAL_KEY: json.dumps(adapter.original)} if adapter.original else {})
    tensors = {file_name(name): array.T for name, array in adapter.tensors.items()}
    write_files(folder, FILE, tensors, adapter.record, metadata)


def read(folder: Path) -> AdapterFile:
    """The adapter in a folder; ValueError if a file is damaged or asks for what is not computed here."""
    record = read_json_object(folder / CONFIG)
    try:
        require_supported(record)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    tensors, metadata = read_tensors(folder / FILE)
    named = {our_name(name, folder / FILE): array.T for name, array in tensors.items()}
    return AdapterFile(record, named, read_original(metadata))


def read_original(metadata: dict[str, str]) -> dict[str, Any] | None:
    try:
        original = json.loads(metadata.get(ORIGINAL_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return original if isinstance(original, dict) else None


def to_record(config: LoRAConfig, layers: list[int] | None, base_name: str | None) -> dict[str, Any]:
    """PEFT's record of a configuration; `layers` are the numbers of the adapted blocks, None for all."""
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(set(targets)),
        "layers_to_transform": layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }


def require_supported(record: dict[str, Any]) -> None:
    if record.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be LORA, got {record.get('peft_type')!r}")
    for key in sorted(record.keys() - KNOWN_KEYS):
        is_harmless = key == "init_lora_weights" and record[key] in INITIALIZATIONS
        if not is_harmless and not is_off(record[key]):
            raise ValueError(f"{key} is not supported and must be off, got {record[key]!r}")


def to_config(record: dict[str, Any], num_blocks: int | None) -> LoRAConfig:
    """The configuration for a model of `num_blocks` blocks; for None, without a model, for all blocks."""
    layers = record.get("layers_to_transform")
    try:
        return LoRAConfig(
            rank=record["r"],
            alpha=record["lora_alpha"],
            dropout=record.get("lora_dropout", 0.0),
            target_modules=read_targets(record.get("target_modules")),
            num_layers=-1 if num_blocks is None else read_layers(layers, num_blocks),
            use_rslora=record.get("use_rslora") or False,
            use_dora=record.get("use_dora") or False,
            rank_pattern=read_pattern(record, "rank_pattern"),
            alpha_pattern=read_pattern(record, "alpha_pattern"),
        )
    except KeyError as error:
        raise ValueError(f"the key {error} is missing") from None


def read_targets(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise ValueError(f"target_modules must be a list of names or a regular expression, got {value!r}")
    return tuple(value)


def read_layers(value: Any, num_blocks: int) -> int:
    """How many of the last layers the list names; -1, which is all, for None."""
    if value is None:
        return -1
    for num_layers in range(1, num_blocks + 1):
        if value == list(range(num_blocks - num_layers, num_blocks)):
            return num_layers
    raise ValueError(f"layers_to_transform must be the last of {num_blocks} layers, got {value!r}")


def read_pattern(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value
