"""The training step and the loop around it.

Differs from mlx_impl/train.py: autograd records while the model runs and `backward` adds to `.grad`, which
`zero_grad` must empty; nothing is lazy, so there is nothing to evaluate and no state to hand to a compiler.
`train` makes the optimizer itself, begins at the first update, and draws dropout from torch's random state as
it stands; a record has no tokens, seconds or memory. `evaluate` returns the loss alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mlx_impl.config import TrainConfig
from reference.data import Batch
from reference.loss import next_token_nats
from reference.model import CausalLM, in_evaluation
from reference.optim import make_optimizer, share_of_peak


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer update did."""

    step: int  # from 1
    loss_nats: float  # mean over the targets, before the update
    grad_norm: float  # of the mean's gradient, before clipping
    learning_rate: float


def batch_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum of nats over the targets, which is differentiated, and their number."""
    logits_BTV = model(batch.inputs_BT, batch.segment_BT)
    return next_token_nats(logits_BTV, batch.targets_BT, batch.mask_BT)


def add_up(model: nn.Module, window: Sequence[Batch]) -> tuple[float, int]:
    """Gradient accumulation: the sums over an update's micro-batches; the gradients' are in `.grad`."""
    total_nats, total_targets = 0.0, 0
    for batch in window:
        nats, num_targets = batch_loss(model, batch)
        nats.backward()  # adds to .grad
        total_nats += nats.item()
        total_targets += int(num_targets)
    return total_nats, total_targets


def apply_mean(optimizer: Optimizer, max_grad_norm: float, num_targets: int) -> float:
    """Update by the gradient of the mean over all targets; its norm before clipping."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad /= num_targets
    norm = clip_grad_norm_(trained, max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def train(model: CausalLM, windows: Iterable[Sequence[Batch]], config: TrainConfig) -> Iterator[StepRecord]:
    """One optimizer update a window of micro-batches; yields what each update did."""
    model.train()
    model.model.grad_checkpoint = config.grad_checkpoint
    optimizer = make_optimizer(model, config)
    schedule = LambdaLR(optimizer, lambda step: share_of_peak(step, config))
    for step, window in enumerate(windows):
        learning_rate = optimizer.param_groups[0]["lr"]
        nats, num_targets = add_up(model, window)
        norm = apply_mean(optimizer, config.max_grad_norm, num_targets)
        yield StepRecord(step + 1, nats / num_targets, norm, learning_rate)
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Nats per target over all batches: the sum of the sums over the sum of the counts."""
    with in_evaluation(model):
        sums = [batch_loss(model, batch) for batch in batches]
    return float(sum(nats for nats, _ in sums) / sum(count for _, count in sums))
