"""Adapters out and in, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Source: PEFT's `save_pretrained` and `utils/save_and_load.py`. Its keys are `base_model.model.` + the module's
name + `.lora_A.weight` of shape (R, I) and `.lora_B.weight` of shape (O, R), both the transpose of ours, and
with DoRA `.lora_magnitude_vector` of shape (O,). The scale is not stored; alpha and rank are. A tensor that
is missing or has no place is an error here, where PEFT warns and leaves an adapter that does nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoint import LoadedModel, load_model, require_shapes
from .config import LoRAConfig
from .files import one_line, read_json_object, whole_file
from .formats.safetensors import read_file
from .lora import add_lora, lora_layers, lora_parameters
from .model import CausalLM
from .targets import select_targets

PREFIX = "base_model.model."
SUFFIXES = {
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}

# Keys that change nothing in the mathematics, or are read below; any other must be off.
KNOWN_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "layers_pattern"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("qalora_group_size", "megatron_core"),  # have a value even where they are not used
}
OFF: tuple[object, ...] = (None, False, "none", {}, [])
INITIAL_LAWS = (None, True, False, "gaussian")  # the other laws change the base model's weights


def save_adapter(model: CausalLM, config: LoRAConfig, folder: Path, base_name: str) -> None:
    """Write both files, each whole or not at all."""
    tensors = {peft_key(name): array.T for name, array in lora_parameters(model).items()}
    with whole_file(folder / "adapter_model.safetensors") as path:
        mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        **selection(model, config),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    with whole_file(folder / "adapter_config.json") as path:
        path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def selection(model: CausalLM, config: LoRAConfig) -> dict[str, Any]:
    """PEFT's two keys; an expression for some layers only, which PEFT refuses, becomes the list of names."""
    targets, num_blocks = config.target_modules, len(model.model.layers)
    is_whole = config.num_layers in (-1, num_blocks)
    layers = None if is_whole else list(range(num_blocks - config.num_layers, num_blocks))
    if not isinstance(targets, str):
        return {"target_modules": sorted(set(targets)), "layers_to_transform": layers}
    names = targets if is_whole else sorted(lora_layers(model))
    return {"target_modules": names, "layers_to_transform": None}


def load_adapter(model: CausalLM, folder: Path) -> LoRAConfig:
    """Wrap the linears that the adapter targets and load their factors; the configuration it came with.

    Raises ValueError in one sentence, the model untouched, when tensors and configuration do not fit it.
    """
    config = read_adapter_config(folder / "adapter_config.json", len(model.model.layers))
    path = folder / "adapter_model.safetensors"
    expected: dict[str, tuple[int, ...]] = {}
    try:
        targets = select_targets(model, config)
    except ValueError as error:
        raise ValueError(f"{folder / 'adapter_config.json'}: {one_line(error)}") from None
    for target in targets:
        expected[peft_key(f"{target.name}.lora_a")] = (target.rank, target.num_in)
        expected[peft_key(f"{target.name}.lora_b")] = (target.num_out, target.rank)
        if config.use_dora:
            expected[peft_key(f"{target.name}.magnitude")] = (target.num_out,)
    tensors = read_file(path)
    require_shapes(tensors, expected, path)
    add_lora(model, config)
    ours = {peft_key(name): name for name in lora_parameters(model)}
    model.load_weights([(ours[key], array.T) for key, array in tensors.items()], strict=False)
    mx.eval(model.parameters())
    return config


def peft_key(name: str) -> str:
    """model.layers.0.self_attn.q_proj.lora_a -> base_model.model.(the same).lora_A.weight"""
    module, _, factor = name.rpartition(".")
    return PREFIX + module + SUFFIXES[factor]


def read_adapter_config(path: Path, num_blocks: int) -> LoRAConfig:
    raw = read_json_object(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {raw.get('peft_type')!r}")
    for key in sorted(raw.keys() - KNOWN_KEYS):
        if raw[key] not in (INITIAL_LAWS if key == "init_lora_weights" else OFF):
            raise ValueError(f"{path}: {key} is not supported and must be off, got {raw[key]!r}")
    try:
        return LoRAConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            target_modules=read_targets(raw.get("target_modules")),
            num_layers=read_layers(raw.get("layers_to_transform"), num_blocks),
            use_rslora=raw.get("use_rslora") or False,
            use_dora=raw.get("use_dora") or False,
            rank_pattern=read_pattern(raw, "rank_pattern"),
            alpha_pattern=read_pattern(raw, "alpha_pattern"),
        )
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_targets(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise ValueError(f"target_modules must be a list of names or a regular expression, got {value!r}")
    return tuple(value)


def read_layers(value: Any, num_blocks: int) -> int:
    """How many of the last layers the list names: all for None."""
    if value is None:
        return -1
    for num_layers in range(1, num_blocks + 1):
        if value == list(range(num_blocks - num_layers, num_blocks)):
            return num_layers
    raise ValueError(f"layers_to_transform must be the last of {num_blocks} layers, got {value!r}")


def read_pattern(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value


def load_with_adapter(
    model: str | Path | None, adapter: Path | None, dequantize: bool = False
) -> LoadedModel:
    """The model, with the adapter if there is one."""
    loaded = load_model(model, dequantize)
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    return loaded
