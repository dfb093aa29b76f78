"""The training step and the loop around it: the MLX pattern.

Source: MLX documentation, "Lazy Evaluation" and "Compilation" (Compiling Training Graphs).
Differs from reference/train.py: gradients are a value that a function returns, not an attribute that a call
fills; nothing runs until `mx.eval`; and a compiler must be told of every state that a step changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from .data import Batch, target_positions
from .loss import next_token_nats
from .model import CausalLM

Arrays = list[mx.array]  # inputs_BT, positions_N, targets_N, mask_N: what a compiled function can take


def batch_loss(model: CausalLM, arrays: Arrays) -> tuple[mx.array, mx.array, mx.array]:
    """The mean over the targets, which is differentiated, and the sum and count, which are reported."""
    inputs_BT, positions_N, targets_N, mask_N = arrays
    x_ND = model.model(inputs_BT).flatten(0, 1)[positions_N]  # the head is needed at targets only
    nats, num_targets = next_token_nats(model.head(x_ND), targets_N, mask_N)
    return nats / num_targets, nats, num_targets


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer update did."""

    step: int  # from 1
    loss_nats: float  # mean over the targets, before the update
    num_targets: int
    num_tokens: int  # read by the model, padding not counted
    learning_rate: float
    seconds: float
    peak_bytes: int


def to_arrays(batch: Batch) -> Arrays:
    """The batch in MLX, of the targets only their positions in it, so that the head is spared the rest."""
    return [mx.array(batch.inputs_BT), *map(mx.array, target_positions(batch))]


def train(
    model: CausalLM, optimizer: Optimizer, batches: Iterable[Batch], compiled: bool
) -> Iterator[StepRecord]:
    """One update a batch, one record an update."""
    model.train()
    optimizer.init(model.trainable_parameters())
    start = time.perf_counter()

    loss_and_grads = nn.value_and_grad(model, batch_loss)  # of what freeze() left trainable
    state = [model.state, optimizer.state, mx.random.state]  # all that a step reads and writes

    def step(arrays: Arrays) -> tuple[mx.array, mx.array]:
        (_, nats, num_targets), grads = loss_and_grads(model, arrays)
        optimizer.update(model, grads)
        return nats, num_targets

    run = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for number, batch in enumerate(batches, start=1):
        nats, num_targets = run(to_arrays(batch))
        mx.eval(state, nats, num_targets)  # before this line nothing has run

        yield StepRecord(
            step=number,
            loss_nats=nats.item() / num_targets.item(),
            num_targets=num_targets.item(),
            num_tokens=batch.num_tokens,
            learning_rate=optimizer.learning_rate.item(),
            seconds=time.perf_counter() - start,
            peak_bytes=mx.get_peak_memory(),
        )
        start = time.perf_counter()  # what is done between two steps is not the step's


def evaluate(model: CausalLM, batches: Iterable[Batch]) -> tuple[float, int]:
    """Nats per target over all batches (the sum of the sums over the sum of the counts), and that count."""
    was_training = model.training
    model.eval()  # dropout off
    total_nats, total_targets = 0.0, 0
    for batch in batches:
        _, nats, num_targets = batch_loss(model, to_arrays(batch))
        total_nats += nats.item()
        total_targets += num_targets.item()
    model.train(was_training)
    return total_nats / total_targets, total_targets
