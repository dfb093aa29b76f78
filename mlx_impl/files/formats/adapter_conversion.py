"""Convert PEFT's adapter files to mlx-lm's and back, without a base model; the way back restores every bit.

mlx-lm has one rank and one scale s for all linears. So a linear of smaller rank is padded with zeros, and the
B of a linear of another scale t is multiplied by t / s (`scale_folding.py`). A converted file keeps the
original's record. It is restored only if converting it again gives the same file, so not after more training.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx

from ...config import LoRAConfig
from ...targets import is_target, rank_and_scale
from . import peft, peft_keys
from .factors import AdapterFile, Tensors, by_linear, is_identical, split_block
from .scale_folding import alpha_for, fold_scale, unfold_scale

Scales = dict[str, float]
# Errors of converting back: the kept record comes from a file and may hold anything.
BAD_RECORD = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError)


def to_mlx_lm(adapter: AdapterFile) -> AdapterFile:
    """A PEFT adapter in mlx-lm's form; ValueError if it could not be converted back bit for bit."""
    if adapter.original is not None:
        original = AdapterFile(adapter.original, adapter.tensors)
        if is_original(original, adapter, to_peft_directly):
            return original
    folded = fold(adapter)
    if not is_original(folded, adapter, unfold):
        raise ValueError("the factors cannot be scaled for mlx-lm and back without losing bits")
    return folded


def to_peft(adapter: AdapterFile) -> AdapterFile:
    """An mlx-lm adapter in PEFT's form: the PEFT adapter it was made from, if unchanged, else its equal."""
    if adapter.original is not None:
        try:
            original = unfold(adapter)
        except BAD_RECORD:
            return to_peft_directly(adapter)
        if is_original(original, adapter, fold):
            return original
    return to_peft_directly(adapter)


def is_original(original: AdapterFile, converted: AdapterFile, convert: Any) -> bool:
    """Whether converting `original` gives `converted`."""
    try:
        return is_identical(convert(original), converted)
    except BAD_RECORD:
        return False


# ---- PEFT -> mlx-lm


def fold(adapter: AdapterFile) -> AdapterFile:
    """A PEFT adapter in mlx-lm's form. Its scale is that of a linear, the one that gives the lowest rank."""
    config, linears = peft.to_config(adapter.record, None), by_linear(adapter.tensors)
    scales = scales_of(config, linears)
    candidates = {scale: fold_all(linears, scales, scale) for scale in set(scales.values())}
    counts = Counter(scales.values())
    scale = min(candidates, key=lambda s: (largest_rank(candidates[s]), -counts[s], s))
    rank = largest_rank(candidates[scale])
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
            "keys": mlx_lm_keys(adapter.record, linears),
        },
    }
    return AdapterFile(record, tensors, adapter.record)


def scales_of(config: LoRAConfig, linears: dict[str, Tensors]) -> Scales:
    """Each linear's scale; ValueError if its factors contradict the configuration."""
    scales: Scales = {}
    for linear, factors in linears.items():
        if not is_target(linear, config):
            raise ValueError(
                f"target_modules must name every linear that has factors, and {linear} is not named"
            )
        rank, scales[linear] = rank_and_scale(linear, config)
        if factors["lora_a"].shape[1] != rank:
            raise ValueError(f"{linear} must have the rank {rank}, got {factors['lora_a'].shape[1]}")
        if ("magnitude" in factors) is not config.use_dora:
            raise ValueError(f"{linear} must have a magnitude if and only if use_dora is set")
    return scales


def fold_all(linears: dict[str, Tensors], scales: Scales, scale: float) -> dict[str, Tensors]:
    """The factors of every linear, at the same scale."""
    return {linear: fold_scale(factors, scales[linear] / scale) for linear, factors in linears.items()}


def largest_rank(linears: dict[str, Tensors]) -> int:
    return max(int(factors["lora_a"].shape[1]) for factors in linears.values())


def mlx_lm_keys(record: dict[str, Any], linears: dict[str, Tensors]) -> list[str]:
    """Paths within a block if the adapter is the same in every block; else full names.

    Without the model, later blocks are unknown; a list of layers, an expression or an exclusion may leave
    them out.
    """
    paths = common_paths(linears)
    has_names = not isinstance(record["target_modules"], str)
    has_names = has_names and not any("layers." in target for target in record["target_modules"])
    is_everywhere = record.get("layers_to_transform") is None and not record.get("exclude_modules")
    if paths and has_names and is_everywhere and first_block(linears) == 0:
        return paths
    return sorted(linears)


def common_paths(linears: dict[str, Tensors]) -> list[str]:
    """The paths of the adapted linears in a block if they are the same from the first block to the last."""
    split = [split_block(linear) for linear in linears]
    paths = {found[1] for found in split if found}
    blocks = {found[0] for found in split if found}
    span = max(blocks) - min(blocks) + 1 if blocks else 0
    is_same = None not in split and len(split) == span * len(paths)
    return sorted(paths) if is_same else []


def first_block(linears: dict[str, Tensors]) -> int:
    return min(found[0] for found in map(split_block, linears) if found)


# ---- mlx-lm -> PEFT


def unfold(adapter: AdapterFile) -> AdapterFile:
    """The inverse of `fold`, by the original's record; wrong if the tensors have changed since."""
    record, scale = adapter.original or {}, adapter.record["lora_parameters"]["scale"]
    peft_keys.require_supported(record)
    config = peft.to_config(record, None)
    tensors: Tensors = {}
    for linear, factors in by_linear(adapter.tensors).items():
        rank, own_scale = rank_and_scale(linear, config)
        if rank > factors["lora_a"].shape[1]:
            raise ValueError(f"the rank of {linear} must be at most the rank of its tensors, got {rank}")
        factors["lora_b"] = unfold_scale(factors, rank, own_scale / scale)
        factors["lora_a"] = factors["lora_a"][:, :rank]
        tensors |= {f"{linear}.{factor}": array for factor, array in factors.items()}
    return AdapterFile(record, tensors)


def to_peft_directly(adapter: AdapterFile) -> AdapterFile:
    """A PEFT adapter with the same tensors, and alpha = scale * rank."""
    settings, linears = adapter.record["lora_parameters"], by_linear(adapter.tensors)
    paths = common_paths(linears)
    blocks = sorted({found[0] for found in map(split_block, linears) if found})
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
