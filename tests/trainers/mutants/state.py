"""Rungs 12 and 16: state that a resumed run loses, and wrong merging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_impl.files.quantized import plain_module
from mlx_impl.lora import LoRALinear, lora_layers
from mlx_impl.run.merging import Merged, merge
from mlx_impl.run.state import load_arrays, state_arrays
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.train import seed_random, train
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.mutants.mutant import Mutant, Patches, training

load, resume, delta_OI = MlxTrainer.load, LoRATrainer.resume, LoRALinear.delta_OI


def restored(keep: Callable[[str], bool]) -> Patches:
    """Resuming loads only some arrays of a saved state."""

    def broken(model: Any, optimizer: Any, arrays: dict) -> None:
        now = state_arrays(model, optimizer)
        load_arrays(model, optimizer, {name: arrays[name] if keep(name) else now[name] for name in now})

    return {"mlx_impl.run.trainer.load_arrays": broken}


def arrays_in_half(model: Any, optimizer: Any) -> dict[str, mx.array]:
    arrays = state_arrays(model, optimizer)
    return {
        n: a.astype(mx.bfloat16).astype(a.dtype) if n.startswith("factors") else a for n, a in arrays.items()
    }


def begin_at_zero(*arguments: Any, first_step: int, **more: Any) -> Iterator[Any]:
    return train(*arguments, **more)


def load_without_scale(self: Any, folder: Any) -> None:
    load(self, folder)
    for layer in lora_layers(self.model).values():
        layer.scale = 20.0


def resume_unfrozen(self: Any, *arguments: Any) -> None:
    resume(self, *arguments)
    self.model.unfreeze()


def delta(of: Callable[[Any], mx.array], kind: str = "LoRALinear") -> Patches:
    return {f"mlx_impl.lora.{kind}.delta_OI": of}


def without_transpose(self: Any) -> mx.array:
    """Of LoRA alone: DoRA needs the sum for its forward pass too."""
    sum_IO, shape_OI = self.lora_a @ self.lora_b, self.linear.weight.shape
    return self.scale * (sum_IO.reshape(shape_OI) if type(self) is LoRALinear else sum_IO.T)


def seeded_by_the_process(*arguments: Any, **more: Any) -> Iterator[Any]:
    """Seeds by the number of micro-batches that this run has seen since it was started or resumed."""
    seen = count()
    with patch("mlx_impl.train.seed_random", lambda seed, *_: seed_random(seed, next(seen), 0)):
        yield from train(*arguments, **more)


def merge_in_half(model: Any) -> Merged:
    merged = merge(model)
    for name, layer in merged.layers.items():
        half_OI = layer.linear.weight.astype(mx.bfloat16) + layer.delta_OI().astype(mx.bfloat16)
        plain = plain_module(layer.linear, half_OI.astype(mx.float32))
        dict(model.named_modules())[name].weight = plain.weight
    return merged


def without_nan(self: Any) -> mx.array:
    return mx.nan_to_num(delta_OI(self), posinf=0.0, neginf=0.0)


def merge_and_keep(model: Any) -> Merged:
    layers = lora_layers(model)
    for layer in layers.values():
        layer.linear.weight = layer.linear.weight + layer.delta_OI()
    return Merged(layers, {}, 0.0)


def unmerge_by_subtraction(model: Any, merged: Merged) -> None:
    plain = dict(model.named_modules())
    for name, layer in merged.layers.items():
        layer.linear.weight = plain[name].weight - layer.delta_OI()
    model.update_modules(tree_unflatten(list(merged.layers.items())))


MUTANTS = [
    Mutant(
        "optimizer-not-resumed",
        12,
        "A resumed run loads the adapter but starts with a new optimizer, so the loss jumps.",
        restored(lambda name: not name.startswith("optimizer")),
        "mlx-lm#97",
    ),
    Mutant(
        "moments-not-resumed",
        12,
        "Adam's step count is resumed, but its moments are not.",
        restored(lambda name: not name.endswith((".m", ".v"))),
        "mlx#1259",
    ),
    Mutant(
        "optimizer-step-not-resumed",
        12,
        "Adam's moments are resumed, but its step count is not, so it applies the bias correction of a "
        "first update again.",
        restored(lambda name: not name.endswith("step")),
    ),
    Mutant(
        "schedule-not-resumed",
        12,
        "A resumed run counts its updates from 0, so the schedule warms up again.",
        training(begin_at_zero),
        "mlx-lm#97",
    ),
    Mutant(
        "random-numbers-not-resumed",
        12,
        "A resumed run draws the dropout masks of its first updates again.",
        training(seeded_by_the_process),
        "speculators#1027",
    ),
    Mutant(
        "adapter-not-resumed",
        12,
        "The names in the file are not the model's, and loading skips unknown names, so no factor is loaded.",
        restored(lambda name: not name.startswith("factors")),
        "peft#2699",
    ),
    Mutant(
        "magnitude-not-resumed",
        12,
        "The state holds A and B, but not DoRA's magnitudes.",
        restored(lambda name: not (name.startswith("factors.") and name.endswith("magnitude"))),
        cases=("dora",),
    ),
    Mutant(
        "state-saved-in-half",
        12,
        "The adapter is saved in bfloat16 while it trains in float32.",
        {"mlx_impl.run.trainer.state_arrays": arrays_in_half},
    ),
    Mutant(
        "scale-not-resumed",
        12,
        "The scale is not saved with the factors, so the reloaded adapter uses the default.",
        {"tests.trainers.mlx_impl.MlxTrainer.load": load_without_scale},
        "mlx-examples#622",
    ),
    Mutant(
        "base-trained-after-a-stop",
        12,
        "Resuming uses other code than starting, and that code does not freeze the base.",
        {"mlx_impl.run.trainer.LoRATrainer.resume": resume_unfrozen},
        "mlx-vlm#2178",
    ),
    Mutant(
        "merge-without-scale",
        15,
        "Merging adds A B without the factor alpha / rank.",
        delta(lambda self: (self.lora_a @ self.lora_b).T),
    ),
    Mutant(
        "merge-without-transpose",
        16,
        "Merging adds A B without the transpose.",
        delta(without_transpose),
        "microsoft/LoRA#34",
    ),
    Mutant(
        "merge-without-magnitude",
        16,
        "DoRA is merged as if it were LoRA.",
        delta(lambda self: self.scale * (self.lora_a @ self.lora_b).T, "DoRALinear"),
        cases=("dora",),
    ),
    Mutant(
        "merge-in-bfloat16",
        16,
        "Merging adds in bfloat16, where most of the update is smaller than the rounding of the weight.",
        {"tests.trainers.mlx_impl.merge": merge_in_half},
        "peft#1388",
    ),
    Mutant(
        "merge-hides-nan",
        16,
        "NaN in the merged weights is replaced by 0, so a diverged adapter seems to be merged well.",
        {"mlx_impl.lora.LoRALinear.delta_OI": without_nan},
    ),
    Mutant(
        "merged-and-still-active",
        16,
        "The update is merged into the weight, but the adapter stays active and adds it again.",
        {"tests.trainers.mlx_impl.merge": merge_and_keep},
    ),
    Mutant(
        "unmerge-by-subtraction",
        16,
        "Unmerging subtracts the update, and rounding then leaves a slightly different base.",
        {"tests.trainers.mlx_impl.unmerge": unmerge_by_subtraction},
    ),
]
