"""Rung 12: `fit` on examples, validation between updates, saving and resuming within an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import mlx.core as mx

from mlx_impl.batching import updates_an_epoch
from mlx_impl.data import evaluation_batches, num_inputs, training_windows
from mlx_impl.lora import lora_layers
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.train import evaluate, seed_random
from tests.trainers.mutants.mutant import Mutant, Patches

save, validate = LoRATrainer.save, LoRATrainer.validate


def evaluating(broken: Callable[..., tuple[float, int]]) -> Patches:
    return {"mlx_impl.run.trainer.evaluate": broken}


def without_dropout(model: Any) -> None:
    """Of every adapter; the model's own mode, by which `train` would turn it on again, stays."""
    for layer in lora_layers(model).values():
        layer.dropout.eval()


def evaluate_and_stay(model: Any, batches: Any, loss: Any) -> tuple[float, int]:
    result = evaluate(model, batches, loss)
    without_dropout(model)
    return result


def evaluate_with_draws(model: Any, batches: Any, loss: Any) -> tuple[float, int]:
    mx.eval(mx.random.uniform())
    return evaluate(model, batches, loss)


def seed_once(seed: int, step: int, micro_batch: int) -> None:
    if step == micro_batch == 0:
        seed_random(seed, 0, 0)


def mean_of_means(self: Any, examples: Any) -> float:
    batches = list(evaluation_batches(examples, self.training.batch_size))
    return sum(self.evaluate_batches([batch]) for batch in batches) / len(batches)


def whole_batches(examples: Any, batch_size: int) -> Iterator[Any]:
    return islice(evaluation_batches(examples, batch_size), max(1, len(examples) // batch_size))


def validate_behind(self: Any, examples: Any) -> float:
    """The loss of the validation before this one."""
    validate(self, examples)
    return self.validation[max(0, len(self.validation) - 2)][1]


def windows_from(
    first: Callable[[int, int], int], change: Callable[[Any, int], Any] = lambda c, _: c
) -> Patches:
    """A resumed run begins at another window: (updates done, updates an epoch)."""

    def broken(examples: Any, config: Any, first_step: int = 0) -> Iterator[Any]:
        an_epoch = updates_an_epoch([num_inputs(example) for example in examples], config)
        changed = change(config, first_step)
        begin = first(first_step, an_epoch)
        windows = training_windows(examples, replace(changed, iters=begin + config.iters), begin)
        return islice(windows, config.iters - first_step)

    return {"mlx_impl.run.trainer.training_windows": broken}


def save_and_stay(self: Any, *given: Any) -> None:
    save(self, *given)
    without_dropout(self.model)


def save_and_reset(self: Any, *given: Any) -> None:
    save(self, *given)
    self.optimizer.init(self.model.trainable_parameters())
    for optimizer in self.optimizer.optimizers:
        optimizer.state["step"] = mx.zeros_like(optimizer.state["step"])


MUTANTS = [
    Mutant(
        "validation-turns-dropout-off",
        12,
        "After a validation the adapters' dropout stays off, so the rest of the run has none.",
        evaluating(evaluate_and_stay),
    ),
    Mutant(
        "validation-draws-random-numbers",
        12,
        "Dropout goes on from the last random number drawn, and a validation draws some of them.",
        {**evaluating(evaluate_with_draws), "mlx_impl.train.seed_random": seed_once},
    ),
    Mutant(
        "validation-averages-means",
        12,
        "The validation loss is the mean of the batches' means, so it depends on the batch size.",
        {"mlx_impl.run.trainer.LoRATrainer.evaluate": mean_of_means},
    ),
    Mutant(
        "validation-drops-the-last-batch",
        12,
        "Validation leaves out the batch that is not full.",
        {"mlx_impl.run.trainer.evaluation_batches": whole_batches},
    ),
    Mutant(
        "validation-one-late",
        12,
        "A validation reports the loss of the one before.",
        {"mlx_impl.run.trainer.LoRATrainer.validate": validate_behind},
    ),
    Mutant(
        "resumed-at-the-epochs-beginning",
        12,
        "A resumed run begins its epoch again, so some examples come twice and others not at all.",
        windows_from(lambda step, an_epoch: step - step % an_epoch),
    ),
    Mutant(
        "resumed-one-window-back",
        12,
        "A resumed run trains again on the window of the last update before the stop.",
        windows_from(lambda step, an_epoch: max(0, step - 1)),
    ),
    Mutant(
        "resumed-one-window-ahead",
        12,
        "A resumed run skips a window.",
        windows_from(lambda step, an_epoch: step + (step > 0)),
    ),
    Mutant(
        "resumed-in-another-order",
        12,
        "A resumed run shuffles anew, by another seed than it began with.",
        windows_from(lambda step, an_epoch: step, lambda c, step: replace(c, data_seed=c.data_seed + step)),
        "transformers#40691",
    ),
    Mutant(
        "saving-turns-dropout-off",
        12,
        "After it has saved, a run goes on with the adapters' dropout off.",
        {"mlx_impl.run.trainer.LoRATrainer.save": save_and_stay},
    ),
    Mutant(
        "saving-forgets-the-step",
        12,
        "After it has saved, a run counts Adam's steps from 0 again.",
        {"mlx_impl.run.trainer.LoRATrainer.save": save_and_reset},
    ),
]
