"""PEFT's adapter files to mlx-lm's and back, without a base model and to the bit.

mlx-lm has one rank R and one scale s. So a linear of smaller rank gets columns of zeros, and one of another
scale t gets t / s into its B. Where the product is no float32 number it is the sum of two, hi + lo, and
[hi; lo] stands beside [A, A]: the function is the same to 2**-48, and (hi + lo) / (t / s), rounded, is B
again. What a file was converted from comes back only if converting that again gives the file.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import LoRAConfig
from ..targets import is_target, rank_and_scale
from . import peft
from .factors import AdapterFile, Tensors, block_of, by_linear, same

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


def scaled(factors: Tensors, ratio: float) -> Tensors:
    if ratio == 1:
        return dict(factors)
    product_RO = to_float64(factors["lora_b"]) * ratio
    hi_RO = to_float32(product_RO)
    lo_RO = to_float32(product_RO - hi_RO)
    if not np.isfinite(hi_RO).all():
        raise ValueError("a factor B is too large for the scale of the other linears")
    a_IR, both = factors["lora_a"], lo_RO.any()
    b_RO = np.concatenate([hi_RO, lo_RO]) if both else hi_RO
    exact = mx.array(b_RO).astype(factors["lora_b"].dtype)  # half precision stays where it suffices
    suffices = not both and np.array_equal(to_float64(exact), b_RO)
    return {
        **factors,
        "lora_a": mx.concatenate([a_IR, a_IR], axis=1) if both else a_IR,
        "lora_b": exact if suffices else mx.array(b_RO),
    }


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


def unscaled(factors: Tensors, rank: int, ratio: float) -> mx.array:
    b_RO, dtype = factors["lora_b"], factors["lora_a"].dtype  # that of A: B may have been widened
    if ratio == 1:
        return b_RO[:rank]
    hi_RO, lo_RO = to_float64(b_RO[:rank]), to_float64(b_RO[rank : 2 * rank])
    lo_RO = np.pad(lo_RO, ((0, rank - len(lo_RO)), (0, 0)))
    product_RO = np.where(lo_RO == 0, hi_RO, hi_RO + lo_RO)  # -0 + 0 would lose the sign
    return mx.array(to_float32(product_RO / ratio)).astype(dtype)


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


def alpha_for(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is the scale, to the bit where there is one, else in float32.

    Between a power of two and the next the doubles that are multiples of 1 / rank can be fewer than all.
    """
    alpha = float(scale) * rank
    near = (alpha, float(np.nextafter(alpha, 0.0)), float(np.nextafter(alpha, np.inf)))
    best = min(near, key=lambda a: (abs(a / rank - scale), np.float32(a / rank) != np.float32(scale)))
    if np.float32(best / rank) != np.float32(scale):
        raise ValueError(f"the scale {scale} is alpha / {rank} for no alpha")
    return best


def to_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return array.astype(np.float32)


def to_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
