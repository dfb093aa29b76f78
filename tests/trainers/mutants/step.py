"""Rungs 8 and 9: wrong optimizers, schedules and clipping; bugs that show only over several updates."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_flatten, tree_map

from mlx_impl.fast.vectors import VectorOptimizer, as_factors, as_vectors
from mlx_impl.optim import AdamW, clip_gradients, learning_rate_of
from mlx_impl.run.guard import FiniteGuard
from mlx_impl.train import add_up, seed_random
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches, with_add_up

apply_single, update = AdamW.apply_single, VectorOptimizer.update
check, run = FiniteGuard.check, MlxTrainer.run


def adamw(change: Callable[[Any], dict]) -> Patches:
    """AdamW with some of its numbers replaced."""

    def broken(self: Any, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        own = {n: getattr(self, n) for n in ("betas", "learning_rate", "step", "weight_decay", "eps")}
        return apply_single(SimpleNamespace(**{**own, **change(self)}), gradient, parameter, state)  # type: ignore[arg-type]

    return {"mlx_impl.optim.AdamW.apply_single": broken}


def with_l2(self: Any, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
    gradient = gradient + self.weight_decay * parameter
    undecayed = parameter / (1 - self.learning_rate * self.weight_decay)
    return apply_single(self, gradient, undecayed, state)


def with_eps_inside(self: Any, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
    (b1, b2), t = self.betas, self.step.astype(mx.float32)
    state["m"] = b1 * state["m"] + (1 - b1) * gradient
    state["v"] = b2 * state["v"] + (1 - b2) * gradient.square()
    m, v = state["m"] / -mx.expm1(t * math.log(b1)), state["v"] / -mx.expm1(t * math.log(b2))
    return parameter * (1 - self.learning_rate * self.weight_decay) - self.learning_rate * m * mx.rsqrt(
        v + self.eps
    )


def with_half_moments(self: Any, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
    updated = apply_single(self, gradient, parameter, state)
    state |= {name: state[name].astype(mx.bfloat16).astype(mx.float32) for name in ("m", "v")}
    return updated


def rates(fast_and_slow: Callable[[float, float], tuple[float, float]]) -> Patches:
    """Other learning rates for A and for the other factors, from the learning rate and LoRA+'s ratio."""

    def broken(self: Any, learning_rate: float) -> None:
        a_rate, b_rate = fast_and_slow(learning_rate, self.ratio)
        self.optimizers[0].learning_rate, self.optimizers[1].learning_rate = a_rate, b_rate

    return {"mlx_impl.optim.LoRAOptimizer.set_learning_rate": broken}


def scheduled(broken: Callable[[int, Any], float]) -> Patches:
    return {f"{name}.learning_rate_of": broken for name in ("mlx_impl.train", "tests.trainers.mlx_impl")}


def mlx_cosine(step: int, config: Any) -> float:
    if config.lr_schedule != "cosine" or step < config.warmup_steps:
        return learning_rate_of(step, config)
    decay = mlx.optimizers.cosine_decay(config.learning_rate, config.iters - config.warmup_steps)
    return decay(mx.array(step - config.warmup_steps)).item()


def clip_by_value(grads: Any, max_norm: float) -> tuple[Any, mx.array]:
    limit = max_norm or math.inf
    return tree_map(lambda g: mx.clip(g, -limit, limit), grads), clip_gradients(grads, 0)[1]


def clip_each_alone(grads: Any, max_norm: float) -> tuple[Any, mx.array]:
    return tree_map(lambda g: clip_gradients(g, max_norm)[0], grads), clip_gradients(grads, 0)[1]


def norm_after_clipping(grads: Any, max_norm: float) -> tuple[Any, mx.array]:
    clipped, _ = clip_gradients(grads, max_norm)
    return clipped, clip_gradients(clipped, 0)[1]


def losses_after_the_update(self: Any, windows: Any, training: Any, compiled: bool) -> list[float]:
    losses = run(self, windows, training, compiled)
    return [*losses[1:], self.evaluate(windows[-1])]


def never_reset(_config: Any) -> Callable:
    total: list[Any] = []

    def add(parts: Any) -> Any:
        sums, gradients = add_up(parts)
        total[:] = [tree_map(mx.add, total[0], gradients) if total else gradients]
        return sums, total[0]

    return add


def one_update_late(_config: Any) -> Callable:
    last: list[Any] = []

    def add(parts: Any) -> Any:
        last.append(add_up(parts))
        return last[-1][0], last[max(0, len(last) - 2)][1]

    return add


def forget_moments(self: Any, *arguments: Any) -> None:
    check(self, *arguments)
    for optimizer in self.optimizer.optimizers:
        optimizer.state = {
            name: tree_map(mx.zeros_like, value) if isinstance(value, dict) else value
            for name, value in optimizer.state.items()
        }


def unseeded(*_: int) -> None:
    mx.random.seed(int.from_bytes(os.urandom(4)))


def seeded_but_by_zero(seed: int, *numbers: int) -> None:
    (seed_random if seed else unseeded)(seed, *numbers)


def update_with_last_views(self: Any, model: Any, gradients: Any) -> None:
    before = dict(self.factors)
    update(self, model, gradients)
    model.update(as_factors(before, model.trainable_parameters()))


def last_first(gradients: Any) -> Any:
    return as_vectors(dict(reversed(tree_flatten(gradients))))


MUTANTS = [
    Mutant(
        "views-of-the-last-update",
        8,
        "The optimizer updates its vectors, but the model keeps views of the old ones.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": update_with_last_views},
    ),
    Mutant(
        "gradients-in-another-order",
        6,
        "The gradients are concatenated in another order than their factors.",
        {"mlx_impl.fast.forward.as_vectors": last_first},
    ),
    Mutant(
        "no-bias-correction",
        8,
        "Adam's bias correction is off, MLX's default: the first update is 3.16 times as long as PyTorch's.",
        {"mlx_impl.optim.AdamW.apply_single": mlx.optimizers.AdamW.apply_single},
        "mlx#1640",
    ),
    Mutant(
        "bias-correction-in-float32",
        8,
        "MLX's bias correction computes 1 - beta^t in float32 and loses digits to cancellation.",
        {"mlx_impl.optim.AdamW": partial(mlx.optimizers.AdamW, bias_correction=True)},
    ),
    Mutant(
        "bias-correction-one-step-late",
        8,
        "Adam's bias correction counts updates from 2 instead of 1.",
        adamw(lambda self: {"step": self.step + 1}),
    ),
    Mutant(
        "eps-before-the-correction",
        8,
        "Adam adds eps to the root before its bias correction, which is wrong for small gradients only.",
        adamw(lambda self: {"eps": self.eps / mx.sqrt(-mx.expm1(self.step * math.log(self.betas[1])))}),
        "transformers#35504",
    ),
    Mutant(
        "eps-inside-the-root",
        8,
        "Adam's eps is under the square root, where 1e-8 acts like 1e-4.",
        {"mlx_impl.optim.AdamW.apply_single": with_eps_inside},
    ),
    Mutant(
        "decay-as-l2",
        8,
        "Weight decay is added to the gradient and passes through the moments: Adam instead of AdamW.",
        {"mlx_impl.optim.AdamW.apply_single": with_l2},
    ),
    Mutant(
        "moments-in-bfloat16",
        8,
        "The moments are stored in bfloat16, but beta2 = 0.999 changes v by less than its last bit.",
        {"mlx_impl.optim.AdamW.apply_single": with_half_moments},
    ),
    Mutant(
        "loraplus-on-a",
        8,
        "LoRA+'s ratio speeds up A instead of B.",
        rates(lambda rate, ratio: (ratio * rate, rate)),
    ),
    Mutant(
        "loraplus-ignored",
        8,
        "LoRA+'s group with the higher learning rate is empty, so B learns as slowly as A.",
        rates(lambda rate, ratio: (rate, rate)),
        "peft#3503",
    ),
    Mutant(
        "schedule-one-update-late",
        8,
        "The learning rate is set after the update that it was meant for, so it comes one update late.",
        scheduled(lambda step, config: learning_rate_of(max(0, step - 1), config)),
    ),
    Mutant(
        "warmup-one-update-longer",
        8,
        "Joining warmup and decay holds the peak for two updates, so the decay is one update late.",
        scheduled(lambda step, config: learning_rate_of(step - (step > config.warmup_steps > 0), config)),
        "mlx-examples#985",
    ),
    Mutant(
        "cosine-in-float32",
        8,
        "MLX's cosine_decay: near pi, 1 + cos cancels in float32, so the end of a long run is a fifth off.",
        scheduled(mlx_cosine),
    ),
    Mutant(
        "clip-by-value",
        8,
        "Each element of the gradient is clipped alone, which changes the direction.",
        {"mlx_impl.train.clip_gradients": clip_by_value},
    ),
    Mutant(
        "clip-each-tensor",
        8,
        "Each tensor is clipped by its own norm, so the global norm can exceed the limit.",
        {"mlx_impl.train.clip_gradients": clip_each_alone},
        trainer=PLAIN,
    ),
    Mutant(
        "norm-reported-after-clipping",
        8,
        "The logged gradient norm is the norm after clipping, so an exploding run looks calm.",
        {"mlx_impl.train.clip_gradients": norm_after_clipping},
    ),
    Mutant(
        "loss-reported-after-the-update",
        8,
        "The logged loss is computed after the update, so it looks one update too good.",
        {"tests.trainers.mlx_impl.MlxTrainer.run": losses_after_the_update},
    ),
    Mutant(
        "gradients-not-reset",
        8,
        "Gradients are not reset, so those of earlier updates are added to the next ones.",
        with_add_up(never_reset),
    ),
    Mutant(
        "gradients-one-update-late",
        9,
        "Each update applies the gradients that were computed one update earlier.",
        with_add_up(one_update_late),
    ),
    Mutant(
        "moments-forgotten",
        9,
        "The moments are reset after every update, as if the loop made a new optimizer each time.",
        {"mlx_impl.run.guard.FiniteGuard.check": forget_moments},
    ),
    Mutant(
        "schedule-not-used",
        8,
        "The schedule is accepted and logged, but never reaches the optimizer.",
        {"mlx_impl.train.learning_rate_of": lambda step, config: config.learning_rate},
        "Soup#683",
    ),
    Mutant(
        "unseeded",
        9,
        "Dropout is seeded by the system's randomness, so no run can be repeated.",
        {"mlx_impl.train.seed_random": unseeded},
    ),
    Mutant(
        "seed-zero-ignored",
        9,
        "`if seed:` treats the seed 0 as no seed.",
        {"mlx_impl.train.seed_random": seeded_but_by_zero},
        "mlx-lm#1660",
    ),
]
