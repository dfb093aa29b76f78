"""Which linears get an adapter, of which rank and scale: PEFT's rules, but what matches nothing is refused.

Source: PEFT's `check_target_module_exists` and `get_pattern_key`; the scales of Hu et al. 2021, section 4.1,
and Kalajdzievski 2023, "rsLoRA", theorem 3.2.
Differs from reference/targets.py: wrong configurations are refused, in one sentence each; a target comes with
its shape, rank and scale; quantized linears are targets too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import mlx.nn as nn

from .config import LoRAConfig
from .model import CausalLM

Number = TypeVar("Number", int, float)
AnyLinear = nn.Linear | nn.QuantizedLinear


@dataclass(frozen=True)
class Target:
    """A linear and the adapter that it gets."""

    name: str
    num_in: int
    num_out: int
    rank: int
    scale: float


def select_targets(model: CausalLM, config: LoRAConfig) -> list[Target]:
    """The targeted linears of the last N blocks, in the model's order.

    Raises ValueError for a target or a pattern that matches nothing or is no regular expression, for more
    blocks than the model has, and for a rank above a linear's smaller side.
    """
    linears = linears_of_last_blocks(model, config.num_layers)
    chosen = [name for name in linears if is_target(name, config)]
    require_matches(config, linears, chosen)
    targets = []
    for name in chosen:
        num_out, num_in = shape_OI(linears[name])
        rank, scale = rank_and_scale(name, config)
        if rank > min(num_out, num_in):
            raise ValueError(
                f"rank must be at most {min(num_out, num_in)}, the smaller side of {name}, got {rank}"
            )
        targets.append(Target(name, num_in, num_out, rank, scale))
    return targets


def shape_OI(linear: AnyLinear) -> tuple[int, int]:
    """The shape of the weight in full."""
    num_out, num_columns = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        return num_out, num_columns * 32 // linear.bits
    return num_out, num_columns


def linears_of_last_blocks(model: CausalLM, num_layers: int) -> dict[str, AnyLinear]:
    num_blocks = len(model.model.layers)
    if num_layers > num_blocks:
        raise ValueError(f"num_layers must be at most the model's {num_blocks}, got {num_layers}")
    first = 0 if num_layers == -1 else num_blocks - num_layers
    return {
        f"model.layers.{number}.{path}": module
        for number in range(first, num_blocks)
        for path, module in reversed(model.model.layers[number].named_modules())
        if isinstance(module, AnyLinear)
    }


def is_target(name: str, config: LoRAConfig) -> bool:
    """A tuple of ends of names, such as "q_proj"; or one string: "all-linear", or a regular expression."""
    targets = config.target_modules
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return compiled(targets).fullmatch(name) is not None
    return any(ends_with(name, target) for target in targets)


def rank_and_scale(name: str, config: LoRAConfig) -> tuple[int, float]:
    """alpha / rank, or with rsLoRA alpha / sqrt(rank), of the linear's own rank and alpha."""
    rank = of_pattern(name, config.rank_pattern, config.rank)
    alpha = of_pattern(name, config.alpha_pattern, config.alpha)
    return rank, alpha / rank**0.5 if config.use_rslora else alpha / rank


def of_pattern(name: str, patterns: dict[str, Number], default: Number) -> Number:
    """The value of the first pattern that matches the end of the name."""
    return next((value for pattern, value in patterns.items() if matches_end(name, pattern)), default)


def ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def matches_end(name: str, pattern: str) -> bool:
    return compiled(rf"(.*\.)?({pattern})").fullmatch(name) is not None


def compiled(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{expression!r} must be a regular expression: {error}") from None


def require_matches(config: LoRAConfig, linears: dict[str, AnyLinear], chosen: list[str]) -> None:
    """ValueError that names a target or a pattern that matches no linear."""
    targets = config.target_modules
    listed = () if isinstance(targets, str) else targets
    unmatched = [target for target in listed if not any(ends_with(name, target) for name in linears)]
    if unmatched or not chosen:
        present = sorted({name.rpartition(".")[2] for name in linears})
        if isinstance(targets, str):
            raise ValueError(
                f"the expression {targets!r} must match the whole name of a linear, such as {min(linears)}"
            )
        wrong = ", ".join(unmatched) or "none"
        raise ValueError(f"target modules must be among {', '.join(present)}, got {wrong}")
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(matches_end(name, pattern) for name in chosen):
                raise ValueError(f"{field} must match targeted linears, and {pattern!r} matches none")
