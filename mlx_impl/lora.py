"""LoRA: a trained low-rank update beside a frozen linear layer.

Source: [1] Hu et al. 2021, "LoRA", eq. 3 and section 4.1 (the scale alpha / rank; B starts at zero).
A's initial law U(-1/sqrt(I), 1/sqrt(I)) is that of PEFT, `kaiming_uniform_(a=sqrt(5))`.
Differs from reference/lora.py: `freeze` for `requires_grad_`, and the checks that a user's input needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .config import LoRAConfig
from .model import CausalLM


class LoRALinear(nn.Module):
    """y = W x + scale * (dropout(x) A) B, with lora_a of shape (I, R) and lora_b of shape (R, O)."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        num_out, num_in = linear.weight.shape
        bound = num_in**-0.5
        self.linear = linear
        self.lora_a = mx.random.uniform(-bound, bound, (num_in, config.rank))
        self.lora_b = mx.zeros((config.rank, num_out))
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.alpha / config.rank

    def __call__(self, x_BTI: mx.array) -> mx.array:
        update_BTO = (self.dropout(x_BTI) @ self.lora_a) @ self.lora_b
        return self.linear(x_BTI) + self.scale * update_BTO


def select_linears(model: CausalLM, config: LoRAConfig) -> list[str]:
    """The linears in the last N blocks whose name is a target or ends with one (PEFT's suffix rule).

    Raises ValueError when a target matches nothing there, or when there are fewer than N blocks.
    """
    num_blocks = len(model.model.layers)
    if config.num_layers > num_blocks:
        raise ValueError(f"num_layers must be at most the model's {num_blocks}, got {config.num_layers}")
    first = 0 if config.num_layers == -1 else num_blocks - config.num_layers
    blocks = tuple(f"model.layers.{number}." for number in range(first, num_blocks))
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks)
    ]
    chosen = {t: [n for n in linears if f".{n}".endswith(f".{t}")] for t in config.target_modules}
    unmatched = [target for target, names in chosen.items() if not names]
    if unmatched or not chosen:
        present = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(
            f"target modules must be among {', '.join(present)}, got {', '.join(unmatched) or 'none'}"
        )
    return sorted({name for names in chosen.values() for name in names})


def add_lora(model: CausalLM, names: Sequence[str], config: LoRAConfig) -> None:
    """Freeze the model, then wrap the named linears; what is new is what trains.

    MLX: freeze first. A module made after `freeze()` is trainable; frozen after it with the rest, it is not.
    Raises ValueError when the rank exceeds a layer's smaller side.
    """
    modules = dict(model.named_modules())
    for name in names:
        smaller_side = min(modules[name].weight.shape)
        if config.rank > smaller_side:
            raise ValueError(
                f"rank must be at most {smaller_side}, the smaller side of {name}, got {config.rank}"
            )
    model.freeze()
    wrapped = [(name, LoRALinear(modules[name], config)) for name in names]
    model.update_modules(tree_unflatten(wrapped))


def lora_parameters(model: CausalLM) -> dict[str, mx.array]:
    """The trainable parameters by name; ValueError if any is no LoRA factor, or if there is none."""
    trainable = dict(tree_flatten(model.trainable_parameters()))
    strangers = [n for n in trainable if n.rpartition(".")[2] not in ("lora_a", "lora_b")]
    if strangers or not trainable:
        raise ValueError(
            f"only LoRA factors may be trainable, and at least one must be: "
            f"{len(trainable)} are, among them {', '.join(strangers[:3]) or 'no stranger'}"
        )
    return trainable


def count_parameters(model: CausalLM) -> tuple[int, int]:
    """How many numbers are trained, and how many there are in all."""
    total = sum(array.size for _, array in tree_flatten(model.parameters()))
    return sum(array.size for array in lora_parameters(model).values()), total
