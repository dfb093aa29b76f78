"""The training step and the loop around it.

Source of schedules: Hugging Face `transformers.optimization`. Source of LoRA+: Hayou et al. 2024, eq. 5.
Differs from mlx_impl/train.py: autograd records while the model runs and `backward` adds to `.grad`, which
`zero_grad` must empty; nothing is lazy, so there is nothing to evaluate and no state to hand to a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mlx_impl.config import TrainConfig
from reference.loss import next_token_nats

Batch = tuple[Tensor, Tensor, Tensor]  # inputs_BT, targets_BT, mask_BT


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer update did."""

    loss_nats: float  # mean over the targets, before the update
    grad_norm: float  # before clipping
    learning_rate: float


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Two groups, because in LoRA+ B and vectors learn faster than A."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [p for name, p in trainable if not name.endswith("lora_a")]
    slow = [p for name, p in trainable if name.endswith("lora_a")]
    groups = [
        {"params": slow, "lr": config.learning_rate},
        {"params": fast, "lr": config.learning_rate * config.loraplus_lr_ratio},
    ]
    kind = {"adamw": AdamW, "sgd": SGD}[config.optimizer]
    return kind(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def share_of_peak(step: int, config: TrainConfig) -> float:
    """What the schedule makes of the learning rate in update `step`, counted from 0."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    left = (config.iters - step) / max(1, config.iters - config.warmup_steps)
    return left if config.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def batch_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum of nats over the targets, which is differentiated, and their number."""
    inputs_BT, targets_BT, mask_BT = batch
    return next_token_nats(model(inputs_BT), targets_BT, mask_BT)


def train_step(
    model: nn.Module, optimizer: Optimizer, window: Sequence[Batch], max_grad_norm: float
) -> tuple[float, float]:
    """One update over all batches of a window; the mean nats per target, and the gradients' norm."""
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    total_nats, total_targets = 0.0, 0
    for batch in window:
        nats, num_targets = batch_loss(model, batch)
        nats.backward()  # adds to .grad
        total_nats += nats.item()
        total_targets += int(num_targets)
    for parameter in trainable:
        parameter.grad /= total_targets
    norm = clip_grad_norm_(trainable, max_grad_norm or math.inf)
    optimizer.step()
    return total_nats / total_targets, norm.item()


def train(model: nn.Module, windows: Iterable[Sequence[Batch]], config: TrainConfig) -> Iterator[StepRecord]:
    """One optimizer update a window."""
    model.train()
    optimizer = make_optimizer(model, config)
    schedule = LambdaLR(optimizer, lambda step: share_of_peak(step, config))
    for window in windows:
        learning_rate = optimizer.param_groups[0]["lr"]
        loss_nats, norm = train_step(model, optimizer, window, config.max_grad_norm)
        yield StepRecord(loss_nats, norm, learning_rate)
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Nats per target over all batches: the sum of the sums over the sum of the counts."""
    model.eval()
    sums = [batch_loss(model, batch) for batch in batches]
    return float(sum(nats for nats, _ in sums) / sum(count for _, count in sums))
