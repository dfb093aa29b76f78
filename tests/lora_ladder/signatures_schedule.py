"""Known bugs of the schedule: when an update gets which learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_impl.config import TrainConfig
from reference.optim import share_of_peak
from tests.lora_ladder.signatures import Hypothesis, Signature, of_runs
from tests.trainers.reference import Run


def shares(broken: Callable[[int, TrainConfig], float]) -> Hypothesis:
    """Another share of the peak, from the update's number, counted from 0, and the configuration."""

    def change(trainer: Any, run: Run, training: TrainConfig) -> None:
        run.schedule.lr_lambdas = [lambda step: broken(step, training)] * 2
        for group, peak in zip(run.optimizer.param_groups, run.schedule.base_lrs, strict=True):
            group["lr"] = peak * broken(run.schedule.last_epoch, training)

    return of_runs(change)


def like(**settings: Any) -> Hypothesis:
    """As if the configuration had these settings."""
    return shares(lambda step, training: share_of_peak(step, replace(training, **settings)))


def at_most(step: int, training: TrainConfig) -> float:
    return share_of_peak(min(step, training.iters), training)


def from_the_start(step: int, training: TrainConfig) -> float:
    """The decay begins at update 0, beneath the warmup."""
    if step < training.warmup_steps:
        return share_of_peak(step, training)
    return share_of_peak(step, replace(training, warmup_steps=0))


def over_the_run(step: int, training: TrainConfig) -> float:
    """After the warmup the decay takes as many updates as the run has, so it does not reach 0."""
    longer = replace(training, iters=training.iters + training.warmup_steps)
    return share_of_peak(step, longer)


def from_one(step: int, training: TrainConfig) -> float:
    """(t + 1) / warmup: the first update has a learning rate already."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    return share_of_peak(step, training)


def by_one_more(step: int, training: TrainConfig) -> float:
    """(t + 1) / (warmup + 1)."""
    if step < training.warmup_steps:
        return (step + 1) / (training.warmup_steps + 1)
    return share_of_peak(step, training)


def by_micro_batch(step: int, training: TrainConfig) -> float:
    return at_most(step * training.grad_accumulation_steps, training)


def known(name: str, sentence: str, hypothesis: Hypothesis, link: str = "") -> Signature:
    return Signature(name, 8, sentence, hypothesis, link)


SIGNATURES = [
    known(
        "schedule one late",
        "the learning rate comes one update late",
        shares(lambda step, training: share_of_peak(max(0, step - 1), training)),
    ),
    known(
        "schedule one early",
        "the learning rate comes one update early",
        shares(lambda step, training: at_most(step + 1, training)),
    ),
    known(
        "schedule ignored",
        "the learning rate is always its peak: neither warmup nor decay reach the optimizer",
        like(lr_schedule="constant", warmup_steps=0),
        "Soup#683",
    ),
    known("warmup ignored", "warmup_steps is ignored", like(warmup_steps=0)),
    known("decay of the rate ignored", "lr_schedule is ignored, warmup is not", like(lr_schedule="constant")),
    known(
        "warmup holds its peak",
        "after the warmup the peak is held for two updates, so the decay is one late",
        shares(lambda step, training: share_of_peak(step - (step > training.warmup_steps > 0), training)),
        "mlx-examples#985",
    ),
    known("warmup from one", "the warmup begins at 1 / warmup_steps, not at 0", shares(from_one)),
    known(
        "warmup by one more",
        "the warmup is (t + 1) / (warmup_steps + 1), not t / warmup_steps",
        shares(by_one_more),
    ),
    known(
        "decay beneath the warmup",
        "the decay counts from update 0, not from the end of the warmup",
        shares(from_the_start),
    ),
    known(
        "decay too long",
        "after the warmup the decay takes as many updates as the whole run",
        shares(over_the_run),
    ),
    known(
        "linear for cosine",
        "the decay is linear, also where cosine is asked for",
        shares(
            lambda step, training: share_of_peak(
                step,
                replace(training, lr_schedule="linear") if training.lr_schedule == "cosine" else training,
            )
        ),
    ),
    known(
        "cosine for linear",
        "the decay is a cosine, also where linear is asked for",
        shares(
            lambda step, training: share_of_peak(
                step,
                replace(training, lr_schedule="cosine") if training.lr_schedule == "linear" else training,
            )
        ),
    ),
    known(
        "schedule by micro-batch",
        "the schedule counts micro-batches, not updates",
        shares(by_micro_batch),
        "NeMo-Automodel#2257",
    ),
    known(
        "first rate kept",
        "every update has the learning rate of the first",
        shares(lambda step, training: share_of_peak(0, training)),
    ),
]
