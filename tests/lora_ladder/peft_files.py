"""PEFT's adapter files in NumPy, `adapter_config.json` and `adapter_model.safetensors`, and PEFT's rules.

Sources: https://github.com/huggingface/safetensors (a header of JSON, its length before it); PEFT 0.21,
`utils/save_and_load.py` (names), `check_target_module_exists` (which linears), `get_pattern_key` (whose rank
and alpha), `LoraLayer.update_layer` (the scale).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_impl.config import LoRAConfig
from tests.derived import Divergence
from tests.lora_ladder.protocol import Arrays

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The project's name of a factor -> PEFT's; A and B are stored transposed.
SUFFIXES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
BLOCK = re.compile(r"model\.layers\.(\d+)\.")

# What PEFT 0.21 writes of a LoRA of linears, besides what `record_of` sets.
OFF = """
    alora_invocation_tokens arrow_config auto_mapping base_model_name_or_path corda_config eva_config
    exclude_modules kasa_config layer_replication layers_pattern lora_ga_config megatron_config
    modules_to_save monteclora_config revision target_parameters trainable_token_indices use_bdlora
    velora_config
"""
UNUSED = {
    **dict.fromkeys(OFF.split()),
    **dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_qalora"), False),
    **{"bias": "none", "inference_mode": True, "init_lora_weights": True, "loftq_config": {}},
    **{"megatron_core": "megatron.core", "peft_type": "LORA", "peft_version": "0.21.2"},
    **{"qalora_group_size": 16, "task_type": "CAUSAL_LM"},
}


def file_names(factors: Iterable[str]) -> dict[str, str]:
    """Of each factor the name of its tensor: model.layers.0.self_attn.q_proj.lora_a becomes
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight.
    """
    parts = {name: name.rpartition(".") for name in factors}
    return {name: f"{PREFIX}{linear}.{SUFFIXES[factor]}" for name, (linear, _, factor) in parts.items()}


def to_file(factors: Arrays) -> Arrays:
    """Under PEFT's names, A as (R, I) and B as (O, R)."""
    return {name: np.ascontiguousarray(factors[ours].T) for ours, name in file_names(factors).items()}


def of_file(tensors: Arrays) -> Arrays:
    """The inverse of `to_file`; a tensor with another name keeps it."""
    factors = {}
    for name, array in tensors.items():
        endings = [ours for ours, theirs in SUFFIXES.items() if name.endswith(f".{theirs}")]
        ours = endings[0] if endings and name.startswith(PREFIX) else None
        linear = name.removeprefix(PREFIX).removesuffix(f".{SUFFIXES[ours]}") if ours else ""
        factors[f"{linear}.{ours}" if ours else name] = array.T
    return factors


def read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    """The tensors (bfloat16 as float32) and their types in the file; Divergence if it is no such file."""
    try:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        tensors = {name: tensor_of(entry, data[start:]) for name, entry in header.items()}
        return tensors, {name: entry["dtype"] for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Divergence(f"{path.name} must be a safetensors file: {type(error).__name__}: {error}") from None


def tensor_of(entry: dict[str, Any], data: bytes) -> np.ndarray:
    begin, end = entry["data_offsets"]
    array = np.frombuffer(data[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return of_bfloat16(array) if entry["dtype"] == "BF16" else array


def write_safetensors(path: Path, tensors: Arrays, dtype: str = "F32") -> None:
    """The tensors in this type and order; bfloat16 by cutting the digits that it lacks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, array in tensors.items():
        part = (bits_of_bfloat16(array) if dtype == "BF16" else array.astype(TYPES[dtype])).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [end, end + len(part)]}
        parts.append(part)
        end += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *parts]))


def bits_of_bfloat16(array: np.ndarray) -> np.ndarray:
    return (array.astype("<f4").view("<u4") >> 16).astype("<u2")


def of_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


def read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Divergence(f"{CONFIG} must be a JSON file: {type(error).__name__}: {error}") from None
    if not isinstance(record, dict) or record.get("peft_type") != "LORA":
        raise Divergence(f"{CONFIG} must be an object whose peft_type is LORA")
    return record


def record_of(lora: LoRAConfig, linears: Iterable[str]) -> dict[str, Any]:
    """What PEFT writes of this adapter; `linears` are the names of those that it adapts.

    PEFT refuses an expression beside a list of layers, so the names themselves stand for both.
    """
    targets: Any = lora.target_modules
    layers = None if lora.num_layers == -1 else sorted({int(BLOCK.findall(name)[0]) for name in linears})
    if layers and isinstance(targets, str):
        targets, layers = sorted(linears), None
    return UNUSED | {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "layers_to_transform": layers,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
    }


def config_of(record: dict[str, Any], num_layers: int) -> LoRAConfig:
    """The inverse of `record_of`, for a model of so many layers."""
    targets, layers = record["target_modules"], record["layers_to_transform"]
    assert layers is None or layers == list(range(num_layers - len(layers), num_layers)), layers
    return LoRAConfig(
        rank=record["r"],
        alpha=record["lora_alpha"],
        dropout=record["lora_dropout"],
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        num_layers=-1 if layers is None else len(layers),
        use_rslora=record["use_rslora"],
        use_dora=record["use_dora"],
        rank_pattern=record["rank_pattern"],
        alpha_pattern=record["alpha_pattern"],
    )


def write_adapter(folder: Path, record: dict[str, Any], factors: Arrays, dtype: str = "F32") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(record, indent=2), encoding="utf-8")
    write_safetensors(folder / TENSORS, to_file(factors), dtype)


# What PEFT makes of a record.


def is_target(name: str, record: dict[str, Any]) -> bool:
    """`check_target_module_exists`, and "all-linear", which leaves out the head."""
    targets, layers = record.get("target_modules"), record.get("layers_to_transform")
    if isinstance(targets, str):
        is_shorthand = targets.lower() == "all-linear"
        return name != "lm_head" if is_shorthand else re.fullmatch(targets, name) is not None
    if name in (targets or ()):
        return True
    if not any(name.endswith(f".{target}") for target in targets or ()):
        return False
    block = BLOCK.match(name)
    wanted = [layers] if isinstance(layers, int) else layers
    return not wanted or (block is not None and int(block[1]) in wanted)


def rank_and_scale(name: str, record: dict[str, Any]) -> tuple[int, float]:
    """The first pattern that matches the end of the name decides; what is not said is PEFT's default."""
    rank = of_pattern(name, record.get("rank_pattern"), record.get("r", 8))
    alpha = of_pattern(name, record.get("alpha_pattern"), record.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if record.get("use_rslora") else rank)


def of_pattern(name: str, patterns: dict[str, Any] | None, default: Any) -> Any:
    """`get_pattern_key`."""
    matching = (key for key in patterns or {} if re.match(rf"(.*\.)?({key})$", name))
    return (patterns or {}).get(next(matching, name), default)


def linears_of(weights: Arrays) -> list[str]:
    """The names of a model's linears: every matrix but the embedding."""
    matrices = [name.removesuffix(".weight") for name, weight in weights.items() if weight.ndim == 2]
    return [name for name in matrices if not name.endswith("embed_tokens")]
