"""AdamW as PyTorch defines it, because MLX's default differs.

`mlx.optimizers.AdamW` leaves the bias correction off, which makes the first step 0.1 / sqrt(0.001) = 3.16
times as long. Turned on, it rounds beta**t to float32 before it takes it from 1, which loses the digits that
count. Differs from reference/: there `torch.optim.AdamW` serves. SGD is the same in both frameworks.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers

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


def make_optimizer(config: TrainConfig) -> mlx.optimizers.Optimizer:
    kind = {"adamw": AdamW, "sgd": mlx.optimizers.SGD}[config.optimizer]
    return kind(config.learning_rate, weight_decay=config.weight_decay)
