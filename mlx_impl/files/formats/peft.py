"""PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors`.

Source: PEFT's `save_pretrained` and `utils/save_and_load.py`. Its keys are `base_model.model.` + the linear's
name + `.lora_A.weight` of shape (R, I) and `.lora_B.weight` of shape (O, R), both the transpose of ours, and
with DoRA `.lora_magnitude_vector` of shape (O,). The scale is not stored; alpha and rank are. An adapter that
was converted from mlx-lm keeps mlx-lm's record in the header of the safetensors file: PEFT ignores that
header, but would warn about an unknown key in its own record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...config import LoRAConfig
from ...disk.files import read_json_object
from .factors import CONFIG, AdapterFile, read_tensors, write_files
from .peft_keys import MERGE, require_supported
from .peft_targets import in_this_model, is_adapted, matching_patterns, read_targets

FILE = "adapter_model.safetensors"
ORIGINAL_KEY = "mlx_lm_adapter_config"  # in the header
PREFIX = "base_model.model."
SUFFIXES = {
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}

# Older versions, and programs that save a state themselves, keep the adapter's name: .lora_A.default.weight.
KEY = re.compile(
    r"base_model\.model\.(?P<linear>.+)\.(?P<factor>lora_[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?P<weight>\.weight)?"
)
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of PyTorch's modules
IGNORED = ".lora_velora_"  # of the gradient's computation


def file_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.lora_a -> base_model.model.(the same).lora_A.weight"""
    linear, _, factor = name.rpartition(".")
    return PREFIX + linear + SUFFIXES[factor]


def our_name(name: str, path: Path) -> str:
    """The inverse, also with the adapter's name in it; ValueError for what is no factor of a linear."""
    plain = name
    for wrapper in WRAPPERS:
        plain = plain.replace(wrapper, "")
    match = KEY.fullmatch(plain)
    factors = {suffix.split(".")[1]: factor for factor, suffix in SUFFIXES.items()}
    if match is None or (match["factor"] != "lora_magnitude_vector" and not match["weight"]):
        raise ValueError(f"{path}: the tensor {name} is not part of a LoRA adapter of linears: {MERGE}")
    return f"{match['linear']}.{factors[match['factor']]}"


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
    named: dict[str, Any] = {}
    for name, array in tensors.items():
        if IGNORED not in name:
            ours = our_name(name, folder / FILE)
            if ours in named:
                raise ValueError(f"{folder / FILE}: must hold one adapter, and has several tensors {ours}")
            named[ours] = array.T
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


def to_config(record: dict[str, Any], linears: Sequence[str] | None) -> LoRAConfig:
    """The configuration for a model with these linears; for None, without a model, for all blocks."""
    targets, num_layers = (read_targets(record), -1) if linears is None else in_this_model(record, linears)
    patterns = {key: read_pattern(record, key) for key in ("rank_pattern", "alpha_pattern")}
    if linears is not None:
        adapted = [name for name in linears if is_adapted(name, record)]
        patterns = {key: matching_patterns(value, adapted) for key, value in patterns.items()}
    try:
        return LoRAConfig(
            rank=record["r"],
            alpha=record["lora_alpha"],
            dropout=record.get("lora_dropout", 0.0),
            target_modules=targets,
            num_layers=num_layers,
            use_rslora=record.get("use_rslora") or False,
            use_dora=record.get("use_dora") or False,
            **patterns,
        )
    except KeyError as error:
        raise ValueError(f"the key {error} is missing") from None


def read_pattern(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value
