"""The optimizer with LoRA+'s two groups, and the learning rate of every update.

Sources: Hugging Face `transformers.optimization` (schedules); Hayou et al. 2024, "LoRA+", eq. 5.
Differs from mlx_impl/optim.py: torch.optim has AdamW with bias correction, and torch has `clip_grad_norm_`;
two groups of one optimizer are two optimizers there; `share_of_peak` is what torch's `LambdaLR` takes.
"""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from mlx_impl.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """One group for A and one for the other factors, whose learning rate LoRA+ multiplies by a ratio."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    of_a = [p for name, p in trainable if name.endswith("lora_a")]
    others = [p for name, p in trainable if not name.endswith("lora_a")]
    groups = [
        {"params": of_a, "lr": config.learning_rate},
        {"params": others, "lr": config.learning_rate * config.loraplus_lr_ratio},
    ]
    kind = {"adamw": AdamW, "sgd": SGD}[config.optimizer]
    return kind(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def share_of_peak(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step`, counted from 0, as a share of its peak."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    left = (config.iters - step) / max(1, config.iters - config.warmup_steps)
    return left if config.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
