"""LoRA: a trained low-rank update beside a frozen linear layer, and its variants.

Sources: [1] Hu et al. 2021, "LoRA", eq. 3 and section 4.1 (B starts at zero); [2] Liu et al. 2024, "DoRA",
eq. 5 and section 4.3 (the norm is detached), in the variant of torchtune and mlx-lm: dropout on A's input
only.
A's initial law U(-1/sqrt(I), 1/sqrt(I)) is that of PEFT, `kaiming_uniform_(a=sqrt(5))`.
Differs from mlx_impl/lora.py: `requires_grad_` for `freeze`; torch's own dropout; the base is neither
quantized nor in bfloat16; a second adapter is not refused; `add_lora` returns the names; merging is here,
because it is for good.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlx_impl.config import LoRAConfig
from reference.model import CausalLM
from reference.targets import rank_and_scale, select_targets


class LoRALinear(nn.Module):
    """y = x W^T + scale * (dropout(x) A) B, with W of shape (O, I), lora_a (I, R) and lora_b (R, O)."""

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
    """y = x V^T m / |V| + b with V = W + scale * (A B)^T and |V| the length of each row, a constant [2]."""

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


def add_lora(model: CausalLM, config: LoRAConfig) -> list[str]:
    """Freeze the model, then wrap the targeted linears: their factors are all that trains. Their names."""
    model.requires_grad_(False)
    names = select_targets(model, config)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, wrap(name, model.get_submodule(name), config))
    return names


def wrap(name: str, linear: nn.Module, config: LoRAConfig) -> LoRALinear:
    assert isinstance(linear, nn.Linear)
    rank, scale = rank_and_scale(name, config)
    return (DoRALinear if config.use_dora else LoRALinear)(linear, rank, scale, config.dropout)


@torch.no_grad()
def merge(model: CausalLM) -> None:
    """Put every update into its base weight, for good."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.linear.weight.copy_(module.merged_weight())
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.linear)
