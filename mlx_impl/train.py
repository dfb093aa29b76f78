"""The training step and the loop around it: the MLX pattern.

Source: MLX documentation, "Lazy Evaluation" and "Compilation" (Compiling Training Graphs).
Differs from reference/train.py: gradients are a value that a function returns, not an attribute that a call
fills; nothing runs until `mx.eval`; a compiler must be told of every state that a step changes. `train` is
given the optimizer, whose moments a resumed run keeps, seeds each micro-batch, and has seams for `fast/`,
several machines and a guard; it reports tokens, seconds and memory too. `evaluate` also returns the number of
targets, and refuses batches without any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .config import TrainConfig
from .data import Batch, Window
from .loss import next_token_nats
from .model import CausalLM, in_evaluation
from .optim import LoRAOptimizer, clip_gradients, learning_rate_of

Arrays = list[Any]  # one batch as MLX arrays
Nats = tuple[mx.array, mx.array]  # (sum of nats over the targets, number of targets)
Sums = tuple[Nats, Any]  # (Nats, gradients of the sum of nats)


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer update did."""

    step: int  # from 1
    loss_nats: float  # mean over the targets, before the update
    grad_norm: float  # of the mean's gradient, before clipping
    learning_rate: float
    num_targets: int
    num_tokens: int  # input tokens, padding not counted
    seconds: float
    peak_bytes: int


class Loss(NamedTuple):
    """How a batch becomes a loss and gradients. `fast.forward.FAST` computes the same numbers in less time.

    FAST's gradients are vectors, so it goes with `fast.vectors.VectorOptimizer`.
    """

    to_arrays: Callable[[Batch], Arrays]
    batch_loss: Callable[[CausalLM, Arrays], Nats]
    flatten_grads: Callable[[Any], Any]  # the tree of gradients as the optimizer takes them


def to_arrays(batch: Batch) -> Arrays:
    """inputs_BT, targets_BT, mask_BT, and segment_BT or None."""
    arrays = (batch.inputs_BT, batch.targets_BT, batch.mask_BT, batch.segment_BT)
    return [None if array is None else mx.array(array) for array in arrays]


def batch_loss(model: CausalLM, arrays: Arrays) -> Nats:
    """The sum of nats over the targets, which is differentiated, and their number."""
    inputs_BT, targets_BT, mask_BT, segment_BT = arrays
    return next_token_nats(model(inputs_BT, segment_BT), targets_BT, mask_BT)


PLAIN = Loss(to_arrays, batch_loss, flatten_grads=lambda tree: tree)


def seed_random(seed: int, step: int, micro_batch: int) -> None:
    """Random numbers depend on these three alone: not on what ran before, nor on which machine runs it.

    Updates and micro-batches are counted from 0.
    """
    mx.random.seed(int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0]))


def add_up(parts: Iterable[Callable[[], Sums]]) -> Sums:
    """Gradient accumulation: the sums over an update's micro-batches, one of them in memory at a time."""
    first, *others = parts
    sums = first()
    for part in others:
        mx.eval(sums)  # before the next micro-batch begins
        sums = tree_map(mx.add, sums, part())
    return sums


def apply_mean(model: CausalLM, optimizer: LoRAOptimizer, max_grad_norm: float, sums: Sums) -> mx.array:
    """Divide the summed gradients by the number of targets, clip, update; the norm before clipping."""
    (_, num_targets), grads = sums
    mean_grads = tree_map(lambda grad: grad / num_targets, grads)  # once, over all micro-batches
    clipped, norm = clip_gradients(mean_grads, max_grad_norm)
    optimizer.update(model, clipped)
    return norm


def train(
    model: CausalLM,
    optimizer: LoRAOptimizer,
    windows: Iterable[Window],
    config: TrainConfig,
    first_step: int = 0,
    compiled: bool = False,
    loss: Loss = PLAIN,
    reduce: Callable[[Iterable[Callable[[], Sums]]], Sums] = add_up,
    check: Callable[[Window, StepRecord], None] = lambda window, record: None,
) -> Iterator[StepRecord]:
    """One optimizer update a window of micro-batches; yields what each update did.

    A resumed run begins at `first_step`, counted from 0. `reduce` gets the micro-batches as functions not yet
    called, and returns their sums; several machines would each call some of them, and add the sums of all.
    `check` may raise to stop the run, as `run.guard.FiniteGuard` does on NaN; without one a run trains on.
    """
    model.train()
    model.model.grad_checkpoint = config.grad_checkpoint
    optimizer.init(model.trainable_parameters())  # keeps the moments of a resumed run
    start = time.perf_counter()

    loss_and_grads = nn.value_and_grad(model, loss.batch_loss)  # of what freeze() left trainable
    state = [model.state, optimizer.state, mx.random.state]  # all that a step reads and writes
    prepare: Callable = partial(mx.compile, inputs=state, outputs=state) if compiled else lambda f: f

    @prepare
    def sum_gradients(arrays: Arrays) -> Sums:
        nats, grads = loss_and_grads(model, arrays)
        return nats, loss.flatten_grads(grads)

    @prepare
    def update(sums: Sums) -> mx.array:
        return apply_mean(model, optimizer, config.max_grad_norm, sums)

    def part(step: int, micro_batch: int, batch: Batch) -> Sums:
        seed_random(config.seed, step, micro_batch)
        return sum_gradients(loss.to_arrays(batch))

    for step, window in enumerate(windows, first_step):
        if not model.training:  # an answer that is still being read has turned dropout off
            model.train()
        optimizer.set_learning_rate(learning_rate_of(step, config))
        sums = reduce(partial(part, step, number, batch) for number, batch in enumerate(window))
        norm = update(sums)
        mx.eval(state, sums[0], norm)  # until here it is a lazy graph, and this runs it

        nats, num_targets = (number.item() for number in sums[0])
        record = StepRecord(
            step=step + 1,
            loss_nats=nats / num_targets,
            grad_norm=norm.item(),
            learning_rate=learning_rate_of(step, config),
            num_targets=num_targets,
            num_tokens=sum(batch.num_tokens for batch in window),
            seconds=time.perf_counter() - start,
            peak_bytes=mx.get_peak_memory(),
        )
        check(window, record)
        yield record
        start = time.perf_counter()  # time between two updates is not counted


def evaluate(model: CausalLM, batches: Iterable[Batch], loss: Loss = PLAIN) -> tuple[float, int]:
    """Nats per target over all batches (the sum of the sums over the sum of the counts), and that count."""
    total_nats, total_targets = 0.0, 0
    with in_evaluation(model):
        for batch in batches:
            nats, num_targets = loss.batch_loss(model, loss.to_arrays(batch))
            total_nats += nats.item()
            total_targets += num_targets.item()
    if total_targets == 0:
        raise ValueError("an evaluation needs at least one target, got none")
    return total_nats / total_targets, total_targets
