"""Rungs 10, 11 and 14: gradient accumulation, compilation, checkpointing, dropout; tokens for padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_impl.fast.forward import FAST
from mlx_impl.fast.low_rank import LowRank, low_rank_of
from mlx_impl.fast.projection import products
from mlx_impl.lora import Dropout
from mlx_impl.optim import clip_gradients, learning_rate_of
from mlx_impl.recompute import next_key
from mlx_impl.train import add_up, train
from tests.trainers.mutants.loss import batches
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches, training, with_add_up

compile_it, drop = mx.compile, Dropout.__call__


def each_part(change: Callable[[Any, Any], Any]) -> Patches:
    """Changes the sums of every micro-batch before they are added."""

    def make(config: Any) -> Callable:
        def changed(part: Callable[[], Any]) -> Any:
            return change(config, part())

        return lambda parts: add_up(partial(changed, part) for part in parts)

    return with_add_up(make)


def its_mean(_config: Any, part: Any) -> Any:
    (nats, num_targets), gradients = part
    return (nats / num_targets, mx.array(1)), tree_map(lambda g: g / num_targets, gradients)


def clipped(config: Any, part: Any) -> Any:
    sums, gradients = part
    limit = config.max_grad_norm if config.grad_accumulation_steps > 1 else 0
    return sums, clip_gradients(gradients, limit * sums[1])[0]


def divided_again(config: Any, part: Any) -> Any:
    return part[0], tree_map(lambda g: g / config.grad_accumulation_steps, part[1])


def full_windows(model: Any, optimizer: Any, windows: Any, config: Any, **more: Any) -> Any:
    kept = [window for window in windows if len(window) == config.grad_accumulation_steps]
    return train(model, optimizer, kept, config, **more)


def rate_by_micro_batch(step: int, config: Any) -> float:
    return learning_rate_of(min(step * config.grad_accumulation_steps, config.iters - 1), config)


def compiled_with(*kept: int) -> Patches:
    """mx.compile captures only some of 0: the model, 1: the optimizer, 2: the random state."""

    def broken(function: Any, inputs: Any, outputs: Any) -> Any:
        return compile_it(function, [inputs[i] for i in kept], [outputs[i] for i in kept])

    return {"mlx.core.compile": broken}


def recomputed_anew(block: Any, x_BTD: mx.array, *others: Any) -> mx.array:
    parameters = block.trainable_parameters()

    def run(trained: dict, x_BTD: mx.array) -> mx.array:
        block.update(trained)
        y_BTD = block(x_BTD, *others)
        block.update(parameters)
        return y_BTD

    return mx.checkpoint(run)(parameters, x_BTD)


def products_of_dropped(x_BTI: mx.array, parts: list[LowRank]) -> list[mx.array]:
    if all(part.dropout is None for part in parts):
        return products(x_BTI, parts)
    return [
        products(x_BTI if part.dropout is None else part.dropout(x_BTI), [part._replace(dropout=None)])[0]
        for part in parts
    ]


def dora_without_dropout(linear: Any) -> LowRank | None:
    part = low_rank_of(linear)
    return part if part is None or part.magnitude_O is None else part._replace(dropout=None)


def always_dropping(self: Any, x: mx.array) -> mx.array:
    return x * mx.random.bernoulli(1 - self.p, x.shape, next_key()) / (1 - self.p)


def evaluate_in_training(model: Any, parts: Any, loss: Any) -> tuple[float, int]:
    model.train()
    sums = [[number.item() for number in loss.batch_loss(model, loss.to_arrays(part))] for part in parts]
    nats, num_targets = np.sum(sums, axis=0)
    return nats / num_targets, int(num_targets)


def dropped_by(change: Callable[[Any, mx.array], mx.array]) -> Patches:
    """A broken dropout while training."""
    return {
        "mlx_impl.lora.Dropout.__call__": lambda self, x: change(self, x) if self.training and self.p else x
    }


def cut_to_length(batch: Any) -> Any:
    """The last 16 columns of a batch, with their padding."""
    return FAST.to_arrays(batch._replace(**{n: getattr(batch, n)[:, -16:] for n in batch._fields[:3]}))


MUTANTS = [
    Mutant(
        "mean-of-means",
        10,
        "Every micro-batch has the same weight, so the tokens of one with few targets weigh more.",
        each_part(its_mean),
        "mlx-lm#1544",
    ),
    Mutant(
        "last-micro-batch-only",
        10,
        "Accumulation only skips updates: the gradients of all but the last micro-batch are lost.",
        with_add_up(lambda config: lambda parts: list(parts)[-1]()),
        "mlx-lm#326",
    ),
    Mutant(
        "divided-by-accumulation-again",
        10,
        "The loss is already a mean over targets, and is divided by the number of micro-batches again.",
        each_part(divided_again),
        "transformers#35438",
    ),
    Mutant(
        "last-window-dropped",
        8,
        "At the end of the data, an update with fewer micro-batches than the others is dropped.",
        training(full_windows),
        "transformers#14309",
    ),
    Mutant(
        "schedule-by-micro-batch",
        10,
        "The schedule counts micro-batches instead of updates, so it ends long before the run.",
        {"mlx_impl.train.learning_rate_of": rate_by_micro_batch},
        "NeMo-Automodel#2257",
    ),
    Mutant(
        "clip-each-micro-batch",
        10,
        "The gradient of each micro-batch is clipped alone, before the sum.",
        each_part(clipped),
    ),
    Mutant(
        "compile-without-random-state",
        14,
        "mx.compile does not capture the random state, so every update drops the same elements.",
        compiled_with(0, 1),
        "mlx-examples#583",
    ),
    Mutant(
        "compile-without-optimizer",
        10,
        "mx.compile does not capture the optimizer, so its moments stay as they were at the first update.",
        compiled_with(0, 2),
    ),
    Mutant(
        "compile-without-model",
        10,
        "mx.compile does not capture the model, so the adapter's weights are constants.",
        compiled_with(1, 2),
        "mlx-lm-lora#50",
    ),
    Mutant(
        "recomputed-with-another-mask",
        10,
        "With checkpointing, the recomputed block draws another dropout mask than the forward pass did.",
        {"mlx_impl.model.recomputed": recomputed_anew},
        trainer=PLAIN,
    ),
    Mutant(
        "recomputed-without-parameters",
        10,
        "With checkpointing, the parameters are no inputs of the recomputed block, so they get no gradient.",
        {"mlx_impl.fast.forward.recomputed": lambda block, forward, x: mx.checkpoint(forward)(x)},
        "transformers#25841",
    ),
    Mutant(
        "dropout-on-the-base",
        10,
        "Dropout is applied to the input of the frozen layer too.",
        {"mlx_impl.fast.projection.products": products_of_dropped},
    ),
    Mutant(
        "dora-without-dropout",
        10,
        "DoRA accepts dropout but does not apply it.",
        {"mlx_impl.fast.projection.low_rank_of": dora_without_dropout},
        "peft#1806",
        ("dora",),
    ),
    Mutant(
        "dropout-never-applied",
        14,
        "The configured dropout is never applied.",
        {"mlx_impl.lora.Dropout.__call__": lambda self, x: x},
        "torchtune#995",
    ),
    Mutant(
        "dropout-not-rescaled",
        14,
        "Dropout does not divide by 1 - p, so the adapter is weaker in training than afterwards.",
        dropped_by(lambda self, x: x * mx.random.bernoulli(1 - self.p, x.shape, next_key())),
    ),
    Mutant(
        "dropout-keeps-p",
        14,
        "Dropout treats p as the share to keep instead of the share to drop.",
        dropped_by(lambda self, x: x * mx.random.bernoulli(self.p, x.shape, next_key()) / self.p),
    ),
    Mutant(
        "dropout-repeats",
        14,
        "Every dropout mask is drawn from the same key, so each update drops the same elements.",
        dropped_by(
            lambda self, x: x * mx.random.bernoulli(1 - self.p, x.shape, mx.random.key(0)) / (1 - self.p)
        ),
    ),
    Mutant(
        "dropout-in-evaluation",
        10,
        "Dropout stays on in evaluation.",
        {"mlx_impl.lora.Dropout.__call__": always_dropping},
        trainer=PLAIN,
    ),
    Mutant(
        "dropout-in-validation",
        10,
        "The validation loop forgets to turn dropout off.",
        {"mlx_impl.run.trainer.evaluate": evaluate_in_training},
    ),
    Mutant(
        "token-zero-is-padding",
        11,
        "Padding is recognized by the token id 0, so a real token 0 is not a target either.",
        batches(lambda batch: batch._replace(mask_BT=batch.mask_BT & (batch.targets_BT != 0))),
    ),
    Mutant(
        "padding-counted-in-the-length",
        5,
        "Rows are truncated to the maximum length on the left after padding, so short rows lose tokens "
        "and keep the padding.",
        {"mlx_impl.run.trainer.FAST": FAST._replace(to_arrays=cut_to_length)},
    ),
]
