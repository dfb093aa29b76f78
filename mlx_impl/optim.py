"""The optimizers as PyTorch defines them, the learning rate of every update, and gradient clipping.

Three things differ in MLX. `mlx.optimizers.AdamW` has bias correction off by default: its first step is
0.1 / sqrt(0.001) = 3.16 times PyTorch's. Turned on, it computes 1 - beta**t in float32, which loses digits
while beta**t is near 1. And its schedules are float32: the last of 10,000 steps of `cosine_decay` is off by a
fifth. So the corrections are computed by `expm1`, and the learning rate in Python's double precision.
Sources: Hugging Face `transformers.optimization` (schedules); Hayou et al. 2024, "LoRA+", eq. 5; PyTorch's
`clip_grad_norm_`.
Differs from reference/optim.py: torch has AdamW and clipping; two optimizers here are two groups of one
there; the learning rate itself is set before each update, where `LambdaLR` there takes a share of the peak.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_flatten, tree_map

from . import ops
from .config import TrainConfig


class AdamW(mlx.optimizers.AdamW):
    """Loshchilov and Hutter 2019, algorithm 2, with the bias corrections c = 1 - beta**t:

    p <- p (1 - lr * decay);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    p <- p - lr * (m / c1) / (sqrt(v / c2) + eps)
    """

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        b1, b2 = self.betas
        learning_rate = self.learning_rate.astype(gradient.dtype)
        t = self.step.astype(gradient.dtype)
        c1, c2 = -mx.expm1(t * math.log(b1)), -mx.expm1(t * math.log(b2))
        state["m"] = m = b1 * state["m"] + (1 - b1) * gradient
        state["v"] = v = b2 * state["v"] + (1 - b2) * gradient.square()
        parameter = parameter * (1 - learning_rate * self.weight_decay)
        return parameter - learning_rate / c1 * m / (mx.sqrt(v) / mx.sqrt(c2) + self.eps)


class LoRAOptimizer(mlx.optimizers.MultiOptimizer):
    """One optimizer for A and one for the other factors, whose learning rate LoRA+ multiplies by `ratio`."""

    def __init__(self, config: TrainConfig) -> None:
        kind = {"adamw": AdamW, "sgd": mlx.optimizers.SGD}[config.optimizer]
        both = [kind(config.learning_rate, weight_decay=config.weight_decay) for _ in range(2)]
        super().__init__(both, [lambda name, _: name.endswith("lora_a")])
        self.ratio = config.loraplus_lr_ratio

    def set_learning_rate(self, learning_rate: float) -> None:
        of_a, of_b = self.optimizers
        of_a.learning_rate, of_b.learning_rate = learning_rate, self.ratio * learning_rate


def learning_rate_of(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step`, counted from 0: a linear warmup to the peak, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.iters - config.warmup_steps)
    return config.learning_rate * (
        1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    )


def clip_gradients(grads: Any, max_norm: float) -> tuple[Any, mx.array]:
    """grads * min(1, max_norm / (norm + 1e-6)), and the norm of all gradients as one vector.

    max_norm = 0 leaves the gradients as they are. The squares are summed in float32 or better.
    """
    squares = [mx.square(ops.widened(grad)).sum() for _, grad in tree_flatten(grads)]
    norm = mx.sqrt(sum(squares, start=mx.array(0.0)))
    if max_norm == 0:
        return grads, norm
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return tree_map(lambda grad: grad * factor.astype(grad.dtype), grads), norm
