"""The training step and the loop around it: the MLX pattern.

Source: MLX documentation, "Lazy Evaluation" and "Compilation" (Compiling Training Graphs).
Differs from reference/train.py: gradients are a value that a function returns, not an attribute that a call
fills; nothing runs until `mx.eval`; and a compiler must be told of every state that a step changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .config import TrainConfig
from .data import Batch, Window, target_positions
from .fast.layout import kept_slots
from .loss import head_nats
from .model import CausalLM, in_evaluation
from .optim import LoRAOptimizer, as_vectors, clip_gradients, learning_rate_of
from .run.guard import FiniteGuard

Arrays = list[Any]  # inputs_BT, positions_N, targets_N, mask_N, and what else the decoder is told
Sums = tuple[tuple[mx.array, mx.array], Any]  # ((nats, number of targets), gradients of the nats)


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer update did."""

    step: int  # from 1
    loss_nats: float  # mean over the targets, before the update
    grad_norm: float  # of the mean's gradient, before clipping
    learning_rate: float
    num_targets: int
    num_tokens: int  # read by the model, padding not counted
    seconds: float
    peak_bytes: int


def to_arrays(batch: Batch) -> Arrays:
    """The batch in MLX, of the targets only their positions in it, so that the head is spared the rest."""
    layout: dict[str, Any] = {}
    if batch.segment_BT is not None:
        layout["segment_BT"] = mx.array(batch.segment_BT)
    if kept := kept_slots(batch):
        layout["kept"] = [mx.array(array) for array in kept if array is not None]
    return [mx.array(batch.inputs_BT), *map(mx.array, target_positions(batch)), layout]


def batch_loss(model: CausalLM, arrays: Arrays) -> tuple[mx.array, mx.array]:
    """The sum of nats over the targets, which is differentiated, and their number."""
    inputs_BT, positions_N, targets_N, mask_N, layout = arrays
    x_ND = model.model.at_targets(inputs_BT, positions_N, **layout)  # padding and prompts need no head
    return head_nats(model.head, model.config.vocab_size, x_ND, targets_N, mask_N)


def in_vectors(sums: Sums) -> Sums:
    """The gradients of all A as one vector, of all B as another."""
    return sums[0], as_vectors(sums[1])


def begin_update(optimizer: LoRAOptimizer, step: int, config: TrainConfig) -> None:
    """Learning rate and random numbers of an update follow from its number alone, as its examples do."""
    optimizer.set_learning_rate(learning_rate_of(step, config))
    mx.random.seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0]))


def add_up(parts: Iterable[Sums]) -> Sums:
    """The sums over a window's batches, one batch in memory at a time."""
    parts = iter(parts)
    sums = next(parts)
    for part in parts:
        mx.eval(sums)  # before the next batch is begun
        sums = tree_map(mx.add, sums, part)
    return sums


def apply_mean(
    model: CausalLM, optimizer: LoRAOptimizer, max_grad_norm: float, sums: Sums
) -> tuple[mx.array, mx.array]:
    """Update by the gradient of the mean over all targets; its norm, and whether all is finite since."""
    (nats, num_targets), grads = sums
    mean_grads = tree_map(lambda grad: grad / num_targets, grads)  # once, over everything
    clipped, norm = clip_gradients(mean_grads, max_grad_norm)
    optimizer.update(model, clipped)
    numbers = [nats, norm, *optimizer.factors.values()]
    return norm, mx.stack([(x - x).sum() for x in numbers]).sum() == 0  # infinity less infinity is no number


def train(
    model: CausalLM,
    optimizer: LoRAOptimizer,
    windows: Iterable[Window],
    config: TrainConfig,
    compiled: bool,
    guard: FiniteGuard | None = None,
) -> Iterator[StepRecord]:
    """One update a window, one record an update. Raises NotFinite, the last good state restored.

    The guard knows how many updates are done; without one it is a new run.
    """
    model.train()
    model.model.grad_checkpoint = config.grad_checkpoint
    optimizer.init(model.trainable_parameters())
    guard = FiniteGuard(model, optimizer, 0) if guard is None else guard
    start = time.perf_counter()

    loss_and_grads = nn.value_and_grad(model, batch_loss)  # of what freeze() left trainable
    state = [model.state, optimizer.state, mx.random.state]  # all that a step reads and writes
    prepare: Callable = partial(mx.compile, inputs=state, outputs=state) if compiled else lambda f: f
    sum_gradients = prepare(lambda arrays: in_vectors(loss_and_grads(model, arrays)))
    update = prepare(lambda sums: apply_mean(model, optimizer, config.max_grad_norm, sums))
    for step, window in enumerate(windows, guard.updates_done):
        begin_update(optimizer, step, config)
        sums = add_up(sum_gradients(to_arrays(batch)) for batch in window)
        norm, is_finite = update(sums)
        mx.eval(state, sums[0], norm, is_finite)  # before this line nothing has run

        nats, num_targets = (number.item() for number in sums[0])
        guard.check(window, nats, norm.item(), is_finite.item())
        yield StepRecord(
            step=step + 1,
            loss_nats=nats / num_targets,
            grad_norm=norm.item(),
            learning_rate=learning_rate_of(step, config),
            num_targets=num_targets,
            num_tokens=sum(batch.num_tokens for batch in window),
            seconds=time.perf_counter() - start,
            peak_bytes=mx.get_peak_memory(),
        )
        start = time.perf_counter()  # what is done between two steps is not the step's


def evaluate(model: CausalLM, batches: Iterable[Batch]) -> tuple[float, int]:
    """Nats per target over all batches (the sum of the sums over the sum of the counts), and that count."""
    total_nats, total_targets = 0.0, 0
    with in_evaluation(model):
        for batch in batches:
            nats, num_targets = batch_loss(model, to_arrays(batch))
            total_nats += nats.item()
            total_targets += num_targets.item()
    if total_targets == 0:
        raise ValueError("an evaluation needs at least one target, got none")
    return total_nats / total_targets, total_targets
