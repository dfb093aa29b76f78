"""The optimizers as PyTorch defines them, the learning rate of every update, and clipping.

`mlx.optimizers.AdamW` leaves the bias correction off, which makes the first step 0.1 / sqrt(0.001) = 3.16
times as long. Turned on, it rounds beta**t to float32 before it takes it from 1, which loses the digits that
count. MLX's schedules are float32 too: the last of 10,000 steps of `cosine_decay` is off by a fifth, of
`linear_schedule` after a warmup by 0.02%. So the learning rate is computed in double precision and handed
over as a number. Sources: Hugging Face `transformers.optimization` (schedules); Hayou et al. 2024, "LoRA+",
eq. 5; PyTorch's `clip_grad_norm_`. Differs from reference/train.py: there torch.optim serves.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

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
    """One optimizer for A and one for the other factors, which LoRA+ lets learn `ratio` times as fast.

    To it the factors of a kind are one vector, and so are their moments; the model sees them as views. Its
    state holds both, so it is all that an update changes.
    """

    def __init__(self, config: TrainConfig) -> None:
        kind = {"adamw": AdamW, "sgd": mlx.optimizers.SGD}[config.optimizer]
        both = [kind(config.learning_rate, weight_decay=config.weight_decay) for _ in range(2)]
        super().__init__(both, [lambda name, _: name.endswith("lora_a")])
        self.ratio = config.loraplus_lr_ratio
        self.factors: dict[str, mx.array] = {}

    def init(self, parameters: Any) -> None:
        self.factors = as_vectors(parameters)
        super().init(self.factors)

    def update(self, model: nn.Module, gradients: Any) -> None:
        """Step, and hand the model its new factors."""
        # In place: a compiled step was told of this dictionary, not of one that takes its place.
        self.factors.update(self.apply_gradients(as_vectors(gradients), self.factors))
        self.hand_over(model)

    def hand_over(self, model: nn.Module) -> None:
        model.update(as_factors(self.factors, model.trainable_parameters()))

    @property
    def state(self) -> dict[str, Any]:
        return {"factors": self.factors, "optimizers": [optimizer.state for optimizer in self.optimizers]}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.factors = state["factors"]
        for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.state = its_state

    def set_learning_rate(self, learning_rate: float) -> None:
        slow, fast = self.optimizers
        slow.learning_rate, fast.learning_rate = learning_rate, self.ratio * learning_rate


def as_vectors(factors: Any) -> dict[str, mx.array]:
    """All A as one vector, all B as another, in float32 at least.

    So a step is a few operations, not a few on each of hundreds of arrays. A lies on its side, as its
    gradient comes (`projection.py`), so that it need not be turned.
    """
    arrays: dict[str, list[mx.array]] = {}
    for name, array in tree_flatten(factors):
        kind = name.rpartition(".")[2]
        arrays.setdefault(kind, []).append((array.T if kind == "lora_a" else array).flatten())
    return {kind: ops.widened(mx.concatenate(of_kind)) for kind, of_kind in arrays.items()}


def as_factors(vectors: dict[str, mx.array], like: Any) -> Any:
    """The vectors cut up again, as views: the inverse of `as_vectors(like)`."""
    cut, start = [], dict.fromkeys(vectors, 0)
    for name, array in tree_flatten(like):
        kind = name.rpartition(".")[2]
        end = start[kind] + array.size
        piece = vectors[kind][start[kind] : end]
        piece = piece.reshape(array.T.shape).T if kind == "lora_a" else piece.reshape(array.shape)
        cut.append((name, piece))
        start[kind] = end
    return tree_unflatten(cut)


def learning_rate_of(step: int, config: TrainConfig) -> float:
    """That of update `step`, counted from 0: warmup from 0 to the peak, then the schedule down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.iters - config.warmup_steps)
    return config.learning_rate * (
        1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    )


def clip_gradients(grads: Any, max_norm: float) -> tuple[Any, mx.array]:
    """grads * min(1, max_norm / (norm + 1e-6)), or as they are for a max_norm of 0; and their norm.

    The norm is that of all gradients as one vector, its squares summed in float32 at least.
    """
    squares = [mx.square(ops.widened(grad)).sum() for _, grad in tree_flatten(grads)]
    norm = mx.sqrt(sum(squares, start=mx.array(0.0)))
    if max_norm == 0:
        return grads, norm
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return tree_map(lambda grad: grad * factor.astype(grad.dtype), grads), norm
