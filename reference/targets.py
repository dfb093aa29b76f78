"""Which linears get an adapter, and its rank and scale: PEFT's rules.

Source: PEFT's `check_target_module_exists` and `get_pattern_key`; the scales of Hu et al. 2021, section 4.1,
and Kalajdzievski 2023, "rsLoRA".
Differs from mlx_impl/targets.py: wrong configurations are not refused; `select_targets` returns names alone.
"""

from __future__ import annotations

import re

from torch import nn

from mlx_impl.config import LoRAConfig
from reference.model import CausalLM


def select_targets(model: CausalLM, config: LoRAConfig) -> list[str]:
    """The names of the targeted linears of the last N blocks, in the model's order."""
    blocks = list(enumerate(model.model.layers))
    chosen = blocks if config.num_layers == -1 else blocks[-config.num_layers :]
    linears = [
        f"model.layers.{number}.{path}"
        for number, block in chosen
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return [name for name in linears if is_target(name, config)]


def is_target(name: str, config: LoRAConfig) -> bool:
    """Whole parts at the end of the name, or a regular expression for all of it."""
    targets = config.target_modules
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def rank_and_scale(name: str, config: LoRAConfig) -> tuple[int, float]:
    """alpha / rank, or with rsLoRA alpha / sqrt(rank), of the linear's own rank and alpha."""
    rank = int(of_pattern(name, config.rank_pattern, config.rank))
    alpha = of_pattern(name, config.alpha_pattern, config.alpha)
    return rank, alpha / rank**0.5 if config.use_rslora else alpha / rank


def of_pattern(name: str, patterns: dict[str, int] | dict[str, float], default: float) -> float:
    """The value of the first pattern that matches the end of the name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
