"""The training step and the loop around it.

Differs from mlx_impl/train.py: autograd records while the model runs and `backward` fills `.grad`, which
`zero_grad` must empty; nothing is lazy, so there is nothing to evaluate and no state to hand to a compiler.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mlx_impl.config import TrainConfig
from reference.loss import next_token_nats

Batch = tuple[Tensor, Tensor, Tensor]  # inputs_BT, targets_BT, mask_BT


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    kind = {"adamw": AdamW, "sgd": SGD}[config.optimizer]
    return kind(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)


def batch_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over the targets, which is differentiated, and the sum and count, which are reported."""
    inputs_BT, targets_BT, mask_BT = batch
    nats, num_targets = next_token_nats(model(inputs_BT), targets_BT, mask_BT)
    return nats / num_targets, nats, num_targets


def train_step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> tuple[Tensor, Tensor]:
    optimizer.zero_grad()
    mean_nats, nats, num_targets = batch_loss(model, batch)
    mean_nats.backward()
    optimizer.step()
    return nats.detach(), num_targets


def train(model: nn.Module, optimizer: Optimizer, batches: Iterable[Batch]) -> Iterator[float]:
    """One optimizer update a batch; yields its loss in nats per target."""
    model.train()
    for batch in batches:
        nats, num_targets = train_step(model, optimizer, batch)
        yield (nats / num_targets).item()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Nats per target over all batches: the sum of the sums over the sum of the counts."""
    model.eval()
    sums = [batch_loss(model, batch)[1:] for batch in batches]
    return float(sum(nats for nats, _ in sums) / sum(count for _, count in sums))
