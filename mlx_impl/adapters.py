"""Adapters out and in, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Source: PEFT's `save_pretrained` and `utils/save_and_load.py`. Its keys are `base_model.model.` + the module's
name + `.lora_A.weight` of shape (R, I) and `.lora_B.weight` of shape (O, R): both the transpose of ours. The
scale is not stored; alpha and rank are. A tensor that is missing or has no place is an error here, where PEFT
warns and leaves an adapter that does nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from .checkpoint import load_safetensors, require_shapes
from .config import LoRAConfig
from .files import read_json_object, whole_file
from .lora import add_lora, lora_parameters, select_linears
from .model import CausalLM

PREFIX = "base_model.model."
SUFFIXES = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}

# Keys that change nothing in the mathematics, or are read below; any other must be off.
KNOWN_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "layers_pattern"),
    *("qalora_group_size", "megatron_core"),  # have a value even where they are not used
}
OFF: tuple[object, ...] = (None, False, "none", {}, [])
INITIAL_LAWS = (None, True, False, "gaussian")  # the other laws change the base model's weights


def save_adapter(model: CausalLM, config: LoRAConfig, folder: Path, base_name: str) -> None:
    """Write both files, each whole or not at all."""
    tensors = {peft_key(name): array.T for name, array in lora_parameters(model).items()}
    with whole_file(folder / "adapter_model.safetensors") as path:
        mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})
    num_blocks = len(model.model.layers)
    first = 0 if config.num_layers == -1 else num_blocks - config.num_layers
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(set(config.target_modules)),
        "layers_to_transform": list(range(first, num_blocks)) if first else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    with whole_file(folder / "adapter_config.json") as path:
        path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: CausalLM, folder: Path) -> LoRAConfig:
    """Wrap the linears that the adapter targets and load their factors; the configuration it came with.

    Raises ValueError in one sentence, the model untouched, when tensors and configuration do not fit it.
    """
    config = read_adapter_config(folder / "adapter_config.json", len(model.model.layers))
    path = folder / "adapter_model.safetensors"
    names = select_linears(model, config)
    tensors = load_safetensors(path)
    linears = dict(model.named_modules())
    expected: dict[str, tuple[int, ...]] = {}
    for name in names:
        num_out, num_in = linears[name].weight.shape
        expected[peft_key(f"{name}.lora_a")] = (config.rank, num_in)
        expected[peft_key(f"{name}.lora_b")] = (num_out, config.rank)
    require_shapes(tensors, expected, path)
    add_lora(model, names, config)
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
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{path}: target_modules must be a list of names, got {targets!r}")
    layers = raw.get("layers_to_transform")
    if layers is not None and layers not in [list(range(n, num_blocks)) for n in range(num_blocks)]:
        raise ValueError(f"{path}: layers_to_transform must be the last of {num_blocks} layers, got {layers}")
    try:
        return LoRAConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            target_modules=tuple(targets),
            num_layers=-1 if layers is None else len(layers),
        )
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
