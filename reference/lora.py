"""LoRA: a trained low-rank update beside a frozen linear layer.

Source: [1] Hu et al. 2021, "LoRA", eq. 3 and section 4.1 (the scale alpha / rank; B starts at zero).
A's initial law U(-1/sqrt(I), 1/sqrt(I)) is that of PEFT, `kaiming_uniform_(a=sqrt(5))`.
Differs from mlx_impl/lora.py: nothing but the framework.
"""

from __future__ import annotations

from torch import Tensor, nn

from mlx_impl.config import LoRAConfig
from reference.model import CausalLM


class LoRALinear(nn.Module):
    """y = W x + scale * (dropout(x) A) B, with lora_a of shape (I, R) and lora_b of shape (R, O)."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        bound = linear.in_features**-0.5
        self.linear = linear
        self.lora_a = nn.Parameter(linear.weight.new_empty(linear.in_features, config.rank))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(config.rank, linear.out_features))
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.alpha / config.rank
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x_BTI: Tensor) -> Tensor:
        update_BTO = (self.dropout(x_BTI) @ self.lora_a) @ self.lora_b
        return self.linear(x_BTI) + self.scale * update_BTO


def add_lora(model: CausalLM, config: LoRAConfig) -> list[str]:
    """Freeze the model, then wrap the targeted linears of the last N blocks; the wrapped names."""
    model.requires_grad_(False)
    blocks = list(enumerate(model.model.layers))
    chosen = blocks if config.num_layers == -1 else blocks[-config.num_layers :]
    names = []
    for number, block in chosen:
        for part in ("self_attn", "mlp"):
            owner = getattr(block, part)
            for target in config.target_modules:
                if hasattr(owner, target):
                    setattr(owner, target, LoRALinear(getattr(owner, target), config))
                    names.append(f"model.layers.{number}.{part}.{target}")
    return names
