"""The bugs of optimizer, schedule and accumulation that signatures must name, beside signature_bugs.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_impl.optim import AdamW, LoRAOptimizer, clip_gradients, learning_rate_of
from mlx_impl.train import add_up, apply_mean
from tests.trainers.given_masks import GivenDropout
from tests.trainers.mutants.mutant import Mutant, Patches, with_add_up
from tests.trainers.mutants.step import adamw, scheduled
from tests.trainers.signature_bugs import bug, stepping

right_init, right_step, right_dropout = LoRAOptimizer.__init__, AdamW.apply_single, GivenDropout.__call__
BETAS = [(0.9, 0.95), (0.9, 0.98), (0.999, 0.9), (0.95, 0.999), (0.5, 0.999)]


# Of the optimizer.


def configured(change: Callable[[Any], dict[str, Any]]) -> Patches:
    """The optimizer is made from other settings."""

    def init(self: Any, config: Any) -> None:
        right_init(self, replace(config, **change(config)))

    return {"mlx_impl.optim.LoRAOptimizer.__init__": init}


def with_attributes(**values: Any) -> Patches:
    """SGD with these; AdamW has none of them."""

    def init(self: Any, config: Any) -> None:
        right_init(self, config)
        for optimizer in self.optimizers:
            if config.optimizer == "sgd":
                vars(optimizer).update(values)

    return {"mlx_impl.optim.LoRAOptimizer.__init__": init}


def with_numbers(**numbers: Any) -> Patches:
    """AdamW with these."""
    return adamw(lambda self: numbers)


def corrected(first: bool, second: bool) -> Patches:
    """Adam with only these moments corrected."""

    def step(self: Any, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        (b1, b2), t = self.betas, self.step.item()
        state["m"] = b1 * state["m"] + (1 - b1) * gradient
        state["v"] = b2 * state["v"] + (1 - b2) * gradient.square()
        m = state["m"] / (1 - b1**t) if first else state["m"]
        v = state["v"] / (1 - b2**t) if second else state["v"]
        parameter = parameter * (1 - self.learning_rate * self.weight_decay)
        return parameter - self.learning_rate * m / (mx.sqrt(v) + self.eps)

    return stepping(step)


def decayed_after(self: Any, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
    by = 1 - self.learning_rate * self.weight_decay
    return right_step(self, gradient, parameter / by, state) * by


def sgd_decayed_by_itself(self: Any, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
    return parameter * (1 - self.weight_decay) - self.learning_rate * gradient


# Of the schedule.


def one_early(step: int, config: Any) -> float:
    return learning_rate_of(min(step + 1, config.iters), config)


def without_decay(step: int, config: Any) -> float:
    return learning_rate_of(step, replace(config, lr_schedule="constant"))


def by_one_more(step: int, config: Any) -> float:
    if step >= config.warmup_steps:
        return learning_rate_of(step, config)
    return config.learning_rate * (step + 1) / (config.warmup_steps + 1)


def decaying_beneath(step: int, config: Any) -> float:
    without = replace(config, warmup_steps=0)
    return learning_rate_of(step, config if step < config.warmup_steps else without)


def decaying_for_the_whole_run(step: int, config: Any) -> float:
    return learning_rate_of(step, replace(config, iters=config.iters + config.warmup_steps))


def as_linear(step: int, config: Any) -> float:
    is_cosine = config.lr_schedule == "cosine"
    return learning_rate_of(step, replace(config, lr_schedule="linear") if is_cosine else config)


def by_micro_batch(step: int, config: Any) -> float:
    """A schedule that is asked for more than its updates stays at the end."""
    return learning_rate_of(min(step * config.grad_accumulation_steps, config.iters), config)


# Of the update: ((nats, number of targets), gradients of the sum of nats) of an update, or of each part.


def applied(change: Callable[[mx.array, Any, float], tuple[Any, float]]) -> Patches:
    """Other gradients and another limit, from the number of targets, the gradients' sum and the limit."""

    def apply(model: Any, optimizer: Any, limit: float, sums: Any) -> mx.array:
        (nats, count), grads = sums
        grads, limit = change(count, grads, limit)
        return apply_mean(model, optimizer, limit, ((nats, count), grads))

    return {"mlx_impl.train.apply_mean": apply}


def by(factor: Any, grads: Any) -> Any:
    return tree_map(lambda g: factor * g, grads)


def clipped_before_the_mean(count: mx.array, grads: Any, limit: float) -> tuple[Any, float]:
    return clip_gradients(grads, limit)[0], 0.0


def sums_of(parts: list[Any]) -> Any:
    """Of an update, from those of its micro-batches."""
    return add_up(map(constant, parts))


def constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def adding(change: Callable[[list[Any]], Any]) -> Patches:
    """Another gradient of the mean, from the micro-batches' sums; the loss is right."""

    def make(config: Any) -> Callable:
        def add(parts: Any) -> Any:
            found = [part() for part in parts]
            (nats, count), _ = sums_of(found)
            return (nats, count), by(count, change(found))

        return add

    return with_add_up(make)


def mean_of(part: Any) -> Any:
    (_, count), grads = part
    return by(1 / count, grads)


def means_added(parts: list[Any]) -> Any:
    first, *others = map(mean_of, parts)
    for other in others:
        first = tree_map(mx.add, first, other)
    return first


def true_mean(parts: list[Any]) -> Any:
    return mean_of(sums_of(parts))


def reporting(loss: Callable[[list[Any]], mx.array]) -> Patches:
    """Another mean loss, from the micro-batches' sums; the gradient is right."""

    def make(config: Any) -> Callable:
        def add(parts: Any) -> Any:
            found = [part() for part in parts]
            (_, count), grads = sums_of(found)
            return (loss(found) * count, count), grads

        return add

    return with_add_up(make)


def of_last(parts: list[Any]) -> mx.array:
    nats, count = parts[-1][0]
    return nats / count


def of_means(parts: list[Any]) -> mx.array:
    return sum((nats / count for (nats, count), _ in parts), start=mx.array(0.0)) / len(parts)


def given_masks(change: Callable[[Any, mx.array, mx.array], mx.array]) -> Patches:
    """Another result of dropout in training, from the module, its input and the right result."""

    def call(self: Any, x: mx.array) -> mx.array:
        right = right_dropout(self, x)
        return change(self, x, right) if self.training else right

    return {"tests.trainers.given_masks.GivenDropout.__call__": call}


# Signature -> a bug of its kind.
OF_UPDATES: dict[str, Mutant] = dict(
    [
        bug("first moment not corrected", corrected(first=False, second=True)),
        bug("second moment not corrected", corrected(first=True, second=False)),
        *(bug(f"eps {eps:g}", with_numbers(eps=eps)) for eps in (1e-5, 1e-7, 1e-10)),
        *(bug(f"betas {betas}", with_numbers(betas=betas)) for betas in BETAS),
        bug("decay after the update", stepping(decayed_after)),
        bug("decay ignored", configured(lambda config: {"weight_decay": 0.0})),
        bug(
            "decay ignored by SGD",
            configured(lambda config: {"weight_decay": 0.0} if config.optimizer == "sgd" else {}),
        ),
        bug("decay twice", configured(lambda config: {"weight_decay": 2 * config.weight_decay})),
        bug("SGD's decay without the rate", {"mlx.optimizers.SGD.apply_single": sgd_decayed_by_itself}),
        bug("momentum", with_attributes(momentum=0.9)),
        bug("Nesterov's momentum", with_attributes(momentum=0.9, nesterov=True)),
        bug("schedule one early", scheduled(one_early)),
        bug("decay of the rate ignored", scheduled(without_decay)),
        bug("warmup by one more", scheduled(by_one_more)),
        bug("decay beneath the warmup", scheduled(decaying_beneath)),
        bug("decay too long", scheduled(decaying_for_the_whole_run)),
        bug("linear for cosine", scheduled(as_linear)),
        bug("schedule by micro-batch", scheduled(by_micro_batch)),
        bug("first rate kept", scheduled(lambda step, config: learning_rate_of(0, config))),
        bug("update by the sum", applied(lambda count, grads, limit: (by(count, grads), limit))),
        bug("update doubled", applied(lambda count, grads, limit: (by(2, grads), limit))),
        bug("update upwards", applied(lambda count, grads, limit: (by(-1, grads), limit))),
        bug("sum clipped, not the mean", applied(clipped_before_the_mean)),
        bug("mean of means", adding(lambda parts: by(1 / len(parts), means_added(parts)))),
        bug("sum of means", adding(means_added)),
        bug("last micro-batch's gradient only", adding(lambda parts: mean_of(parts[-1]))),
        bug("first micro-batch's gradient only", adding(lambda parts: mean_of(parts[0]))),
        bug("divided by the micro-batches again", adding(lambda parts: by(1 / len(parts), true_mean(parts)))),
        bug("loss as a mean of means", reporting(of_means)),
        bug("loss of the last micro-batch", reporting(of_last)),
        bug("given masks: not used", given_masks(lambda self, x, right: x)),
        bug("given masks: not rescaled", given_masks(lambda self, x, right: right * (1 - self.p))),
        bug("given masks: divided by p", given_masks(lambda self, x, right: right * (1 - self.p) / self.p)),
        bug("given masks: turned round", given_masks(lambda self, x, right: x / (1 - self.p) - right)),
    ]
)
