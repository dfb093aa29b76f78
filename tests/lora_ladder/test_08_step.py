"""Rung 8, step: one optimizer update, from given gradients, moves every factor as `torch.optim` does.

Tested are AdamW with PyTorch's defaults (bias correction in full precision, decoupled weight decay), SGD,
LoRA+, clipping by the global norm, and schedules that count optimizer updates. Hyper-parameters are powers of
two, so that none is rounded. MLX: `mlx.optimizers.AdamW` has bias correction off by default, which makes the
first update 3.16 times as long; when it is on, 1 - beta^t is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import cos, pi
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from mlx_impl.config import TrainConfig
from tests.derived import within
from tests.lora_ladder.cases import Case, random_array, rows_of
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays

T = TypeVar("T")
NUM_UPDATES = 5
TRAINING = TrainConfig(iters=NUM_UPDATES, learning_rate=2.0**-5, weight_decay=2.0**-3)
SGD = replace(TRAINING, optimizer="sgd")
KINDS = {
    "adamw": TRAINING,
    "sgd": SGD,
    "adamw without decay": replace(TRAINING, weight_decay=0.0),
    "loraplus": replace(TRAINING, loraplus_lr_ratio=8.0),
    "loraplus sgd": replace(SGD, loraplus_lr_ratio=8.0),
    "linear": replace(TRAINING, lr_schedule="linear", warmup_steps=2),
}
each_kind = pytest.mark.parametrize("training", KINDS.values(), ids=KINDS)
SCHEDULES = [(kind, warmup) for kind in ("constant", "linear", "cosine") for warmup in (0, 3)]


def given_gradients(case: Case, num_updates: int) -> list[Arrays]:
    """Different gradients for each update, with sizes from 1e-4 to 1."""
    scales = np.logspace(-4, 0, num_updates)
    return [
        {name: random_array(f"{name} {t}", factor.shape, scale) for name, factor in case.factors.items()}
        for t, scale in enumerate(scales)
    ]


def by_either(act: Callable[[TrainConfig], T], training: TrainConfig) -> T:
    """What says nothing about the optimizer, by SGD, or by AdamW where the trainer does not claim SGD."""
    try:
        return act(replace(training, optimizer="sgd"))
    except NotImplementedError:
        return act(replace(training, optimizer="adamw"))


def moved(trainer: Any, gradients: list[Arrays], training: TrainConfig) -> Arrays:
    trainer.apply_gradients(gradients, training)
    return trainer.factors()


@pytest.mark.needs("apply_gradients")
@pytest.mark.alone
@each_kind
def test_given_gradients_move_a_factor_that_was_zero_as_in_the_reference(
    case: Case, judge: Judge, training: TrainConfig
) -> None:
    """B starts at zero, so after one update B is that update, and no digit is lost in a larger number."""
    zero, gradients = case.with_zero_b(), given_gradients(case, 1)
    judge(zero, lambda trainer: moved(trainer, gradients, training), longest_sum=1)


@pytest.mark.needs("apply_gradients")
@pytest.mark.alone
@each_kind
@pytest.mark.parametrize("num_updates", [1, NUM_UPDATES])
def test_given_gradients_move_the_factors_as_in_the_reference(
    case: Case, judge: Judge, training: TrainConfig, num_updates: int
) -> None:
    """After one update and after five. Each element is a sum over the updates."""
    gradients = given_gradients(case, num_updates)
    judge(case, lambda trainer: moved(trainer, gradients, training), longest_sum=num_updates)


@pytest.mark.needs("apply_gradients")
@pytest.mark.alone
@pytest.mark.parametrize("case", ["dora"], indirect=True)
def test_a_magnitude_learns_as_fast_as_b(case: Case, judge: Judge) -> None:
    """In LoRA+ only A has the lower learning rate."""
    gradients = given_gradients(case, 2)
    judge(case, lambda trainer: moved(trainer, gradients, KINDS["loraplus"]), longest_sum=2)


def closed_form(kind: str, warmup: int, iters: int) -> list[float]:
    """The learning rate of each update t = 0, 1, ..., as a share of the peak."""
    rates = []
    for t in range(iters):
        done = (t - warmup) / (iters - warmup)
        falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[kind]
        rates.append(t / warmup if t < warmup else falling)
    return rates


@pytest.mark.needs("learning_rates")
@pytest.mark.alone
@pytest.mark.parametrize(("kind", "warmup"), SCHEDULES)
def test_the_learning_rate_of_every_update_is_the_closed_form(
    case: Case, candidate: Any, judge: Judge, kind: str, warmup: int
) -> None:
    """It rises from 0 to the peak in the warmup, then falls to 0 (or stays); five rounded operations."""
    training = TrainConfig(iters=10, learning_rate=2.0**-5, lr_schedule=kind, warmup_steps=warmup)
    rates = np.array(case.build(candidate).learning_rates(training))
    expected = 2.0**-5 * np.array(closed_form(kind, warmup, training.iters))
    judge.hold([within("learning rates", rates, expected, 0.0, 5)])


@pytest.mark.needs("learning_rates")
@pytest.mark.alone
@pytest.mark.parametrize(("kind", "warmup"), SCHEDULES)
def test_the_last_learning_rate_of_a_long_run_is_the_closed_form(
    case: Case, candidate: Any, judge: Judge, kind: str, warmup: int
) -> None:
    """The last of 10,000 updates, compared alone: near pi, 1 + cos x has few digits in float32."""
    training = TrainConfig(iters=10_000, learning_rate=2.0**-5, lr_schedule=kind, warmup_steps=warmup)
    last = np.array(case.build(candidate).learning_rates(training)[-1])
    expected = np.array(2.0**-5 * closed_form(kind, warmup, training.iters)[-1])
    judge.hold([within("last learning rate", last, expected, 0.0, 5)])


@pytest.mark.needs("gradient_norms")
def test_the_norm_before_clipping_is_reported(case: Case, judge: Judge) -> None:
    """The norm of all gradients together, as one vector."""
    clipped = replace(TRAINING, iters=1, max_grad_norm=2.0**-4)
    longest_sum = sum(value.size for value in case.factors.values())

    def norms(trainer: Any) -> Arrays:
        return {"norms": np.array(by_either(lambda t: trainer.gradient_norms([[case.batch]], t), clipped))}

    judge(case, norms, longest_sum)


@pytest.mark.needs("token_counts")
def test_the_tokens_of_an_update_are_those_of_all_its_micro_batches(
    case: Case, candidate: Any, judge: Judge
) -> None:
    """Input tokens without padding, which is what tokens per second are computed from."""
    batches = [rows_of(case.batch, rows) for rows in ([0], [1, 2], [2])]
    windows = [batches, batches[1:]]
    trainer, training = case.build(candidate), replace(TRAINING, iters=2, grad_accumulation_steps=3)
    ours = by_either(lambda either: trainer.token_counts(windows, either), training)
    expected = [sum(batch.num_tokens for batch in window) for window in windows]
    judge.same_bits({"tokens": np.array(ours)}, {"tokens": np.array(expected)})


def trained(trainer: Any, case: Case, training: TrainConfig) -> Arrays:
    losses = trainer.train([[case.batch]] * training.iters, training)
    return {"losses": np.array(losses), **trainer.factors()}


@pytest.mark.parametrize("training", [SGD, TRAINING], ids=["sgd", "adamw"])
def test_one_update_equals_the_reference(case: Case, judge: Judge, training: TrainConfig) -> None:
    """The trainer's own gradients together with its optimizer."""
    judge(case, lambda trainer: trained(trainer, case, replace(training, iters=1)))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_run_warms_up_and_takes_the_rates_of_its_schedule(case: Case, judge: Judge, kind: str) -> None:
    """By SGD, whose updates are proportional to the rate: the factors after five of them."""
    scheduled = replace(SGD, lr_schedule=kind, warmup_steps=3)
    judge(case, lambda trainer: trained(trainer, case, scheduled), NUM_UPDATES * case.longest_sum)


@pytest.mark.parametrize("training", [SGD, TRAINING], ids=["sgd", "adamw"])
def test_gradients_are_clipped_by_their_global_norm(case: Case, judge: Judge, training: TrainConfig) -> None:
    """The limit is 1/16, far below the norm over all tensors; the direction of the gradient stays."""
    clipped = replace(training, iters=1, max_grad_norm=2.0**-4)
    judge(case, lambda trainer: trained(trainer, case, clipped))


def test_gradients_below_the_limit_are_not_touched(case: Case, candidate: Any, judge: Judge) -> None:
    """Equal to the run without clipping, to the bit."""

    def run(limit: float) -> Arrays:
        training = replace(TRAINING, iters=1, max_grad_norm=limit)
        return by_either(lambda either: trained(case.build(candidate), case, either), training)

    free, limited = run(0.0), run(2.0**20)
    judge.same_computation(limited, free, case.longest_sum)


def test_the_loss_reported_is_that_before_the_update(case: Case, judge: Judge, candidate: Any) -> None:
    """It is the mean over the targets that `loss` counts."""
    nats, num_targets = case.build(judge.oracle(torch.float64)).loss(case.batch)
    (reported,) = case.build(candidate).train([[case.batch]], replace(TRAINING, iters=1))
    judge.hold([within("loss", np.array(reported), np.array(nats / num_targets), 0.0, case.longest_sum)])
