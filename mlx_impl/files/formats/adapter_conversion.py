"""PEFT's adapter files to mlx-lm's and back, without a base model and to the bit.

mlx-lm has one rank and one scale s. So a linear of smaller rank gets columns of zeros, and one of another
scale t gets t / s into its B (`scale_folding.py`). What a file was converted from comes back only if
converting that again gives the file.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx

from ...config import LoRAConfig
from ...targets import is_target, rank_and_scale
from . import peft
from .factors import AdapterFile, Tensors, block_of, by_linear, same
from .scale_folding import alpha_for, scaled, unscaled

Scales = dict[str, float]
STRANGE = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError)  # a kept record can be anything


def to_mlx_lm(adapter: AdapterFile) -> AdapterFile:
    """mlx-lm's form of PEFT's; ValueError where it could not be undone."""
    if adapter.other is not None:
        original = AdapterFile(adapter.other, adapter.tensors)
        if is_original(original, adapter, to_peft_plainly):
            return original
    folded = fold(adapter)
    if not is_original(folded, adapter, unfold):
        raise ValueError("the factors cannot be scaled for mlx-lm so that the way back restores every bit")
    return folded


def to_peft(adapter: AdapterFile) -> AdapterFile:
    """PEFT's form of mlx-lm's: what it was converted from, if it still is that, or the plain equivalent."""
    if adapter.other is not None:
        try:
            original = unfold(adapter)
        except STRANGE:
            return to_peft_plainly(adapter)
        if is_original(original, adapter, fold):
            return original
    return to_peft_plainly(adapter)


def is_original(original: AdapterFile, converted: AdapterFile, convert: Any) -> bool:
    try:
        return same(convert(original), converted)
    except STRANGE:
        return False


# ---- PEFT -> mlx-lm


def fold(adapter: AdapterFile) -> AdapterFile:
    config, linears = peft.to_config(adapter.record, None), by_linear(adapter.tensors)
    scales = scales_of(config, linears)
    candidates = {scale: fold_all(linears, scales, scale) for scale in set(scales.values())}
    counts = Counter(scales.values())
    scale = min(candidates, key=lambda s: (rank_of(candidates[s]), -counts[s], s))  # the fewest columns
    rank = rank_of(candidates[scale])
    tensors: Tensors = {}
    for linear, factors in candidates[scale].items():
        missing = rank - factors["lora_a"].shape[1]
        factors["lora_a"] = mx.pad(factors["lora_a"], [(0, 0), (0, missing)])
        factors["lora_b"] = mx.pad(factors["lora_b"], [(0, missing), (0, 0)])
        tensors |= {f"{linear}.{factor}": array for factor, array in factors.items()}
    record = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "model": adapter.record.get("base_model_name_or_path"),
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": config.dropout,
            "keys": keys_for(adapter.record, linears),
        },
    }
    return AdapterFile(record, tensors, adapter.record)


def scales_of(config: LoRAConfig, linears: dict[str, Tensors]) -> Scales:
    scales: Scales = {}
    for linear, factors in linears.items():
        if not is_target(linear, config):
            raise ValueError(f"target_modules must name every linear that has factors, and not {linear}")
        rank, scales[linear] = rank_and_scale(linear, config)
        if factors["lora_a"].shape[1] != rank:
            raise ValueError(f"{linear} must have the rank {rank}, got {factors['lora_a'].shape[1]}")
        if ("magnitude" in factors) is not config.use_dora:
            raise ValueError(f"{linear} must have a magnitude with use_dora, and only then")
    return scales


def fold_all(linears: dict[str, Tensors], scales: Scales, scale: float) -> dict[str, Tensors]:
    """Every linear's factors for the one scale."""
    return {linear: scaled(factors, scales[linear] / scale) for linear, factors in linears.items()}


def rank_of(linears: dict[str, Tensors]) -> int:
    return max(int(factors["lora_a"].shape[1]) for factors in linears.values())


def keys_for(record: dict[str, Any], linears: dict[str, Tensors]) -> list[str]:
    """Paths within a block where all blocks have the same, as far as can be seen; whole names otherwise."""
    paths = common_paths(linears)
    has_names = not isinstance(record["target_modules"], str)
    has_names = has_names and not any("layers." in target for target in record["target_modules"])
    if paths and has_names and record.get("layers_to_transform") is None and first_block(linears) == 0:
        return paths
    return sorted(linears)


def common_paths(linears: dict[str, Tensors]) -> list[str]:
    """The paths of the adapted linears in a block, if every block from the first to the last has the same."""
    places = [block_of(linear) for linear in linears]
    paths = {place[1] for place in places if place}
    blocks = {place[0] for place in places if place}
    span = max(blocks) - min(blocks) + 1 if blocks else 0
    is_grid = None not in places and len(places) == span * len(paths)
    return sorted(paths) if is_grid else []


def first_block(linears: dict[str, Tensors]) -> int:
    return min(place[0] for place in map(block_of, linears) if place)


# ---- mlx-lm -> PEFT


def unfold(adapter: AdapterFile) -> AdapterFile:
    """The adapter of PEFT's that `fold` made this one of."""
    record, scale = adapter.other or {}, adapter.record["lora_parameters"]["scale"]
    peft.require_supported(record)
    config = peft.to_config(record, None)
    tensors: Tensors = {}
    for linear, factors in by_linear(adapter.tensors).items():
        rank, own_scale = rank_and_scale(linear, config)
        if rank > factors["lora_a"].shape[1]:
            raise ValueError(f"the rank of {linear} must be at most that of its tensors, got {rank}")
        factors["lora_b"] = unscaled(factors, rank, own_scale / scale)
        factors["lora_a"] = factors["lora_a"][:, :rank]
        tensors |= {f"{linear}.{factor}": array for factor, array in factors.items()}
    return AdapterFile(record, tensors)


def to_peft_plainly(adapter: AdapterFile) -> AdapterFile:
    """The same tensors; alpha = scale * rank."""
    settings, linears = adapter.record["lora_parameters"], by_linear(adapter.tensors)
    paths = common_paths(linears)
    blocks = sorted({place[0] for place in map(block_of, linears) if place})
    if paths:
        layers = None if blocks[0] == 0 else blocks
        targets = tuple(paths)
    else:
        layers, targets = None, tuple(sorted(linears))
    config = LoRAConfig(
        rank=settings["rank"],
        alpha=alpha_for(settings["scale"], settings["rank"]),
        dropout=settings["dropout"],
        target_modules=targets,
        use_dora=adapter.record.get("fine_tune_type") == "dora",
    )
    record = peft.to_record(config, layers, adapter.record.get("model"))
    return AdapterFile(record, adapter.tensors, adapter.record)
