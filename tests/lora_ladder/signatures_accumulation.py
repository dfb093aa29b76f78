"""Known bugs of gradient accumulation and of clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlx_impl.config import TrainConfig
from reference.train import batch_loss
from tests.lora_ladder.signatures import Hypothesis, Signature, of_dialect, of_members, of_runs
from tests.trainers.reference import Run

Grads = list[torch.Tensor]
Sums = list[tuple[float, int, Grads]]  # of each micro-batch: nats, targets, gradients of the sum of nats


def sums_of(model: Any, window: Any, trained: Grads) -> Sums:
    found = []
    for batch in window:
        nats, count = batch_loss(model, batch)
        found.append((nats.item(), int(count), list(torch.autograd.grad(nats, trained))))
    return found


def total(parts: Sums) -> Grads:
    return [torch.stack(grads).sum(0) for grads in zip(*(part[2] for part in parts), strict=True)]


def mean(parts: Sums) -> Grads:
    """The gradient of the mean over all targets of the micro-batches."""
    return [grad / sum(part[1] for part in parts) for grad in total(parts)]


def loss(parts: Sums) -> float:
    return sum(part[0] for part in parts) / sum(part[1] for part in parts)


def clipped(grads: Grads, limit: float) -> Grads:
    """By the norm of all together; 0 means no limit."""
    norm = torch.sqrt(sum((grad.square().sum() for grad in grads), torch.zeros(())))
    return [grad * min(1.0, limit / (float(norm) + 1e-6)) for grad in grads] if limit else grads


def updating(
    gradient: Callable[[Sums, TrainConfig], Grads],
    clip: Callable[[Grads, float], Grads] = clipped,
    reported: Callable[[Sums], float] = loss,
) -> Hypothesis:
    """An update with another gradient, another way to clip it, or another loss in the report."""

    def change(trainer: Any, run: Run, training: TrainConfig) -> None:
        def update(model: Any, window: Any) -> tuple[float, float]:
            parts = sums_of(model, window, run.trained)
            for parameter, grad in zip(
                run.trained, clip(gradient(parts, training), training.max_grad_norm), strict=True
            ):
                parameter.grad = grad
            run.optimizer.step()
            run.schedule.step()
            return reported(parts), 0.0

        run.update = update  # type: ignore[method-assign]

    return of_runs(change)


def with_gradient(gradient: Callable[[Sums], Grads]) -> Hypothesis:
    return updating(lambda parts, _: gradient(parts))


def with_clip(clip: Callable[[Grads, float], Grads]) -> Hypothesis:
    return updating(lambda parts, _: mean(parts), clip)


def scaled(factor: Callable[[Sums, TrainConfig], float]) -> Hypothesis:
    return updating(lambda parts, training: [factor(parts, training) * grad for grad in mean(parts)])


def means_added(parts: Sums) -> Grads:
    return total([(nats, count, [g / count for g in grads]) for nats, count, grads in parts])


def by_value(grads: Grads, limit: float) -> Grads:
    return [grad.clamp(-limit, limit) for grad in grads] if limit else grads


def each_alone(grads: Grads, limit: float) -> Grads:
    return [clipped([grad], limit)[0] for grad in grads]


def always(grads: Grads, limit: float) -> Grads:
    """To the limit, also from below it."""
    norm = torch.sqrt(sum((grad.square().sum() for grad in grads), torch.zeros(())))
    return [grad * limit / float(norm) for grad in grads] if limit else grads


def each_micro_batch(parts: Sums, training: TrainConfig) -> Grads:
    cut = [
        (nats, n, [n * g for g in clipped([g / n for g in grads], training.max_grad_norm)])
        for nats, n, grads in parts
    ]
    return mean(cut)


def whole_windows(self: Any, train: Any, windows: Any, training: TrainConfig) -> list[float]:
    return train([window for window in windows if len(window) >= training.grad_accumulation_steps], training)


def mean_of_losses(parts: Sums) -> float:
    return sum(nats / count for nats, count, _ in parts) / len(parts)


def known(name: str, rung: int, sentence: str, hypothesis: Hypothesis, link: str = "") -> Signature:
    return Signature(name, rung, sentence, hypothesis, link)


SIGNATURES = [
    Signature(
        "mean of means",
        10,
        "every micro-batch has the same weight, whatever its number of targets",
        of_dialect(accumulation="mean of means"),
        "mlx-lm#1544",
        "accumulation = 'mean of means'",
    ),
    known(
        "mean of means, in the loss too",
        10,
        "every micro-batch has the same weight, whatever its number of targets",
        updating(lambda parts, _: [g / len(parts) for g in means_added(parts)], reported=mean_of_losses),
        "mlx-lm#1544",
    ),
    known(
        "loss as a mean of means",
        10,
        "the reported loss is the mean of the micro-batches' means; the gradient is right",
        updating(lambda parts, _: mean(parts), reported=mean_of_losses),
    ),
    known(
        "sum of means",
        10,
        "the means of the micro-batches are added and not divided by their number",
        with_gradient(means_added),
        "transformers#34191",
    ),
    known(
        "last micro-batch only",
        10,
        "only the last micro-batch is used: the gradients of the others are lost",
        updating(lambda parts, _: mean(parts[-1:]), reported=lambda parts: loss(parts[-1:])),
        "mlx-lm#326",
    ),
    known(
        "last micro-batch's gradient only",
        10,
        "only the gradient of the last micro-batch is used",
        with_gradient(lambda parts: mean(parts[-1:])),
        "mlx-lm#326",
    ),
    known(
        "first micro-batch's gradient only",
        10,
        "only the gradient of the first micro-batch is used",
        with_gradient(lambda parts: mean(parts[:1])),
    ),
    known(
        "divided by the accumulation again",
        10,
        "the mean is divided by grad_accumulation_steps again",
        scaled(lambda parts, training: 1 / training.grad_accumulation_steps),
        "transformers#35438",
    ),
    known(
        "divided by the micro-batches again",
        10,
        "the mean is divided by the number of micro-batches again",
        scaled(lambda parts, _: 1 / len(parts)),
        "transformers#35438",
    ),
    known("clipping ignored", 8, "max_grad_norm is ignored", with_clip(lambda grads, limit: grads)),
    known("clipped by value", 8, "each element is clipped, not the norm", with_clip(by_value)),
    known(
        "each tensor clipped alone",
        8,
        "each tensor is clipped by its own norm, not by the norm of all together",
        with_clip(each_alone),
    ),
    known(
        "clipped from below too",
        8,
        "a gradient below the limit is scaled up to it",
        with_clip(always),
    ),
    known(
        "sum clipped, not the mean",
        8,
        "the gradient of the sum is clipped, before it is divided by the number of targets",
        updating(
            lambda parts, training: [
                g / sum(part[1] for part in parts) for g in clipped(total(parts), training.max_grad_norm)
            ],
            lambda grads, limit: grads,
        ),
    ),
    known(
        "each micro-batch clipped",
        10,
        "the gradient of each micro-batch is clipped alone, before the sum",
        updating(each_micro_batch, lambda grads, limit: grads),
    ),
    known(
        "loss of the last micro-batch",
        10,
        "the reported loss is that of the last micro-batch",
        updating(lambda parts, _: mean(parts), reported=lambda parts: loss(parts[-1:])),
    ),
    known(
        "last window dropped",
        10,
        "an update with fewer micro-batches than the others is dropped",
        of_members(train=whole_windows),
        "transformers#14309",
    ),
]
