"""The training step and the loop around it: the MLX pattern.

Source: MLX documentation, "Lazy Evaluation" and "Compilation" (Compiling Training Graphs).
Differs from reference/train.py: gradients are a value that a function returns, not an attribute that a call
fills; nothing runs until `mx.eval`; and a compiler must be told of every state that a step changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from .data import Batch
from .loss import next_token_nats
from .model import CausalLM

Step = Callable[[list[mx.array]], tuple[mx.array, mx.array]]


def batch_loss(model: CausalLM, batch: list[mx.array]) -> tuple[mx.array, mx.array, mx.array]:
    """The mean over the targets, which is differentiated, and the sum and count, which are reported."""
    inputs_BT, targets_BT, mask_BT = batch
    nats, num_targets = next_token_nats(model(inputs_BT), targets_BT, mask_BT)
    return nats / num_targets, nats, num_targets


def make_step(model: CausalLM, optimizer: Optimizer, compiled: bool) -> tuple[Step, list]:
    """One optimizer update as a function of the batch, and the state that it changes."""
    loss_and_grads = nn.value_and_grad(model, batch_loss)  # of what freeze() left trainable
    state = [model.state, optimizer.state, mx.random.state]  # all that a step reads and writes

    def step(batch: list[mx.array]) -> tuple[mx.array, mx.array]:
        (_, nats, num_targets), grads = loss_and_grads(model, batch)
        optimizer.update(model, grads)
        return nats, num_targets

    return (mx.compile(step, inputs=state, outputs=state) if compiled else step), state


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


def to_arrays(batch: Batch) -> list[mx.array]:
    return [mx.array(batch.inputs_BT), mx.array(batch.targets_BT), mx.array(batch.mask_BT)]


def train(
    model: CausalLM, optimizer: Optimizer, batches: Iterable[Batch], compiled: bool
) -> Iterator[StepRecord]:
    """One update a batch, one record an update."""
    optimizer.init(model.trainable_parameters())
    step, state = make_step(model, optimizer, compiled)
    for number, batch in enumerate(batches, start=1):
        start = time.perf_counter()
        model.train()  # dropout on; whoever evaluated between two steps turned it off
        nats, num_targets = step(to_arrays(batch))
        mx.eval(state, nats, num_targets)  # MLX: before this line nothing has run
        yield StepRecord(
            step=number,
            loss_nats=nats.item() / num_targets.item(),
            num_targets=num_targets.item(),
            num_tokens=batch.num_tokens,
            learning_rate=optimizer.learning_rate.item(),
            seconds=time.perf_counter() - start,
            peak_bytes=mx.get_peak_memory(),
        )


def evaluate(model: CausalLM, batches: Iterable[Batch]) -> tuple[float, int]:
    """Nats per target over all batches (the sum of the sums over the sum of the counts), and that count."""
    model.eval()
    total_nats, total_targets = 0.0, 0
    for batch in batches:
        _, nats, num_targets = batch_loss(model, to_arrays(batch))
        total_nats += nats.item()
        total_targets += num_targets.item()
    return total_nats / total_targets, total_targets
