"""The dropout masks that a trainer draws, read off what it trains.

While A = 0 an adapter adds nothing, whatever its dropout does, so that the inputs x of every linear and the
gradients dy of its outputs are those of the base model, which the reference knows. One update of SGD then
moves A by

    -lr dA,    dA_IR = x~^T G,    G_NR = scale dy B^T

where x~_NI = x * keep / (1 - p) is what dropout leaves of the inputs at the update's N positions. With N <= R
this has one solution, x~^T = dA G^+ with the pseudo-inverse G^+, and x~ / x is 0 or 1 / (1 - p).

What cannot be read is left out. Positions at which G is 0 up to rounding are (the query of a row's first
token, which can attend to one key). For the others, errors dG of G and dx of x and the rounding of A change
x~^T by at most

    (|x|^T |dG| / (1 - p) + |rounding of A| / lr) |G^+| + |dx|^T / (1 - p)

and an element of x~ is read where this is below READING |x| / 4, because a sound trainer uses at most a
quarter of a tolerance. dG and dx are the differences between the reference in float32 and in float64, the
root mean square of each position's row, times the FACTOR of every tolerance. A is rounded once an update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mlx_impl.config import BLOCK_LINEARS, LoRAConfig, TrainConfig
from mlx_impl.data import Batch
from reference.lora import LoRALinear
from tests.derived import FACTOR, UNIT_ROUNDOFF
from tests.lora_ladder.cases import SPEC, Case, make_batch, make_factors, make_weights, random_rows
from tests.lora_ladder.protocol import Arrays, Dialect
from tests.trainers.reference import oracle

NUM_UPDATES, MICRO_BATCHES, ROWS, TOKENS = 5, 2, 2, 3
POSITIONS = MICRO_BATCHES * ROWS * TOKENS  # of an update
LORA = LoRAConfig(rank=16, alpha=20.0)  # of at least as many columns as an update has positions
READING = 2.0**-6  # relative; an element whose mask might be read with a larger error is not read
TRAINING = TrainConfig(
    iters=NUM_UPDATES,
    learning_rate=2.0**-24,  # so that A stays near 0
    optimizer="sgd",
    grad_accumulation_steps=MICRO_BATCHES,
)

AXES = ("update", "micro-batch", "row", "token", "layer", "linear", "feature")


@dataclass(frozen=True)
class Masks:
    """Of every element of every adapted linear's input, with one axis for each of `AXES`."""

    ratio: np.ndarray  # x~ / x; 0 where it could not be read
    is_read: np.ndarray

    @property
    def keep(self) -> np.ndarray:
        return self.ratio > 0.5

    @property
    def signs(self) -> np.ndarray:
        """+1 kept, -1 dropped, 0 not read."""
        return np.where(self.is_read, np.where(self.keep, 1.0, -1.0), 0.0)


def case_with_zero_a(p: float) -> Case:
    lora = replace(LORA, dropout=p)
    weights = make_weights(SPEC)
    factors = make_factors(SPEC, lora, weights)
    zeroed = {name: value * (not name.endswith("lora_a")) for name, value in factors.items()}
    return Case("zero A", SPEC, lora, weights, zeroed)


def window() -> list[Batch]:
    """Rows of one length, every token of them a target."""
    return [
        make_batch(random_rows(SPEC.vocab_size, (TOKENS + 1,) * ROWS, seed=50 + n), (1,) * ROWS)
        for n in range(MICRO_BATCHES)
    ]


def masks_drawn(candidate: Any, p: float, how: str = "train", training: TrainConfig = TRAINING) -> Masks:
    """Those of the first updates: the runs of one update, of two, ... differ by the last one's gradient."""
    case = case_with_zero_a(p)
    known, inexact = (
        inputs_and_pullbacks(case, candidate.dialect, dtype) for dtype in (torch.float64, torch.float32)
    )
    noise = {
        name: tuple(FACTOR * root_mean_square(inexact[name][i] - known[name][i]) / (1 - p) for i in (0, 1))
        for name in known
    }
    before, updates = case.factors, []
    for num_updates in range(1, min(training.iters, NUM_UPDATES) + 1):
        trainer = case.build(candidate)
        getattr(trainer, how)([window()] * num_updates, training)
        after = trainer.factors()
        updates.append(masks_of_update(before, after, known, noise, training.learning_rate))
        before = after
    ratio, is_read = (np.stack(arrays) for arrays in zip(*updates, strict=True))
    return Masks(ratio, is_read)


def inputs_and_pullbacks(
    case: Case, dialect: Dialect, dtype: torch.dtype
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each adapted linear x_NI and G_NR, by the reference without dropout."""
    trainer = case.with_dropout(0.0).build(oracle(dialect, dtype))
    linears: dict[str, LoRALinear] = trainer.adapted()
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in linears}
    grads: dict[str, list[np.ndarray]] = {name: [] for name in linears}
    hooks = []
    for name, linear in linears.items():

        def keep(_: Any, given: Any, output: torch.Tensor, name: str = name) -> None:
            inputs[name].append(given[0].detach().numpy())
            output.register_hook(lambda grad: grads[name].append(grad.numpy()))

        hooks.append(linear.register_forward_hook(keep))
    num_targets = sum(batch.mask_BT.sum() for batch in window())
    for batch in window():
        trainer.gradients(batch)  # of the batch's mean
    shares = [batch.mask_BT.sum() / num_targets for batch in window()]
    known = {}
    for name, linear in linears.items():
        x_NI = np.concatenate([x_BTI.reshape(-1, x_BTI.shape[-1]) for x_BTI in inputs[name]])
        dy_NO = np.concatenate(
            [share * dy.reshape(-1, dy.shape[-1]) for share, dy in zip(shares, grads[name], strict=True)]
        )
        known[name] = x_NI, linear.scale * dy_NO @ case.factors[f"{name}.lora_b"].astype(np.float64).T
    return known


def masks_of_update(
    before: Arrays,
    after: Arrays,
    known: dict[str, tuple[np.ndarray, np.ndarray]],
    noise: dict[str, tuple[np.ndarray, ...]],
    learning_rate: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The ratio x~ / x and whether it was read: (micro-batch, row, token, layer, linear, feature)."""
    shape = (POSITIONS, SPEC.num_hidden_layers, len(BLOCK_LINEARS), max_features())
    ratio, is_read = np.zeros(shape), np.zeros(shape, dtype=bool)
    for name, (x_NI, g_NR) in known.items():
        noise_of_x, noise_of_g = noise[name]
        a_name, num_in = f"{name}.lora_a", x_NI.shape[1]
        grad_IR = (before[a_name].astype(np.float64) - after[a_name]) / learning_rate
        kept_N = (root_mean_square(g_NR) > noise_of_g)[:, 0]
        inverse_RN = np.linalg.pinv(g_NR[kept_N])
        rounding_IR = (
            NUM_UPDATES * UNIT_ROUNDOFF * (np.abs(before[a_name]) + np.abs(after[a_name])) / learning_rate
        )
        error_IN = (np.abs(x_NI).T @ noise_of_g + rounding_IR) @ np.abs(inverse_RN)
        dropped_NI, is_read_NI = np.zeros_like(x_NI), np.zeros(x_NI.shape, dtype=bool)
        dropped_NI[kept_N] = (grad_IR @ inverse_RN).T
        error_NI = error_IN.T + noise_of_x[kept_N]
        is_read_NI[kept_N] = error_NI < READING / 4 * np.abs(x_NI[kept_N])
        here = (slice(None), int(name.split(".")[2]), BLOCK_LINEARS.index(name.rpartition(".")[2]))
        is_read[(*here, slice(num_in))] = is_read_NI
        ratio[(*here, slice(num_in))] = dropped_NI / np.where(x_NI == 0, 1, x_NI)
    axes = (MICRO_BATCHES, ROWS, TOKENS, *shape[1:])
    return np.where(is_read, ratio, 0).reshape(axes), is_read.reshape(axes)


def root_mean_square(values_NR: np.ndarray) -> np.ndarray:
    """Of each row; (N, 1)."""
    return np.sqrt(np.mean(np.square(values_NR), axis=1, keepdims=True))


def max_features() -> int:
    return max(SPEC.hidden_size, SPEC.intermediate_size, SPEC.num_attention_heads * SPEC.head_dim)
