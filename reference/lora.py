"""LoRA: a trained low-rank update beside a frozen linear layer, and its variants.

Sources: [1] Hu et al. 2021, "LoRA", eq. 3 and section 4.1 (the scale alpha / rank; B starts at zero);
[2] Kalajdzievski 2023, "rsLoRA" (alpha / sqrt(rank)); [3] Liu et al. 2024, "DoRA", eq. 5 and section 4.3 (the
norm is detached), in the variant of torchtune and mlx-lm: dropout on A's input only.
A's initial law U(-1/sqrt(I), 1/sqrt(I)) is that of PEFT, `kaiming_uniform_(a=sqrt(5))`.
Differs from mlx_impl/lora.py: wrong configurations are not refused.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from mlx_impl.config import LoRAConfig
from reference.model import CausalLM


class LoRALinear(nn.Module):
    """y = W x + scale * (dropout(x) A) B, with lora_a of shape (I, R) and lora_b of shape (R, O)."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        bound = linear.in_features**-0.5
        self.linear = linear
        self.lora_a = nn.Parameter(linear.weight.new_empty(linear.in_features, rank))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(rank, linear.out_features))
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x_BTI: Tensor) -> Tensor:
        update_BTO = (self.dropout(x_BTI) @ self.lora_a) @ self.lora_b
        return self.linear(x_BTI) + self.scale * update_BTO

    def merged_weight(self) -> Tensor:
        return self.linear.weight + self.scale * (self.lora_a @ self.lora_b).T


class DoRALinear(LoRALinear):
    """y = (m / |V|) V x + b with V = W + scale * (A B)^T and |V| the length of each row, a constant [3]."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank, scale, dropout)
        self.magnitude = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x_BTI: Tensor) -> Tensor:
        length_O = super().merged_weight().norm(dim=1).detach()
        update_BTO = (self.dropout(x_BTI) @ self.lora_a) @ self.lora_b
        direction_BTO = x_BTI @ self.linear.weight.T + self.scale * update_BTO
        y_BTO = self.magnitude / length_O * direction_BTO
        return y_BTO if self.linear.bias is None else y_BTO + self.linear.bias

    def merged_weight(self) -> Tensor:
        weight_OI = super().merged_weight()
        return (self.magnitude / weight_OI.norm(dim=1))[:, None] * weight_OI


def is_target(name: str, config: LoRAConfig) -> bool:
    """PEFT's rule: whole parts at the end of the name, or a regular expression for all of it."""
    targets = config.target_modules
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def of_pattern(name: str, patterns: dict[str, int] | dict[str, float], default: float) -> float:
    """The value of the first pattern that matches the end of the name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def wrap(name: str, linear: nn.Linear, config: LoRAConfig) -> LoRALinear:
    rank = int(of_pattern(name, config.rank_pattern, config.rank))
    alpha = of_pattern(name, config.alpha_pattern, config.alpha)
    scale = alpha / rank**0.5 if config.use_rslora else alpha / rank
    return (DoRALinear if config.use_dora else LoRALinear)(linear, rank, scale, config.dropout)


def add_lora(model: CausalLM, config: LoRAConfig) -> list[str]:
    """Freeze the model, then wrap the targeted linears of the last N blocks; the wrapped names."""
    model.requires_grad_(False)
    blocks = list(enumerate(model.model.layers))
    chosen = blocks if config.num_layers == -1 else blocks[-config.num_layers :]
    names = []
    for number, block in chosen:
        for path, module in list(block.named_modules()):
            name = f"model.layers.{number}.{path}"
            if isinstance(module, nn.Linear) and is_target(name, config):
                owner, _, attribute = path.rpartition(".")
                setattr(block.get_submodule(owner), attribute, wrap(name, module, config))
                names.append(name)
    return names


@torch.no_grad()
def merge(model: CausalLM) -> None:
    """Put every update into its base weight, for good."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.linear.weight.copy_(module.merged_weight())
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.linear)
