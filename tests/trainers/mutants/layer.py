"""Rung 2: adapters on the wrong layers, with a wrong scale, rank or shape, or never called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_impl.lora import add_lora
from mlx_impl.targets import Target, select_targets
from tests.trainers.mlx_impl import MlxTrainer
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches, lora_call

init_trainer = MlxTrainer.__init__


def each_target(change: Callable[[Target], Target]) -> Patches:
    def select(model: Any, config: Any) -> list[Target]:
        return [change(target) for target in select_targets(model, config)]

    return {"mlx_impl.lora.select_targets": select}


def ignoring(**settings: Any) -> Patches:
    """As if the configuration had these settings."""
    return {
        "mlx_impl.lora.select_targets": lambda model, config: select_targets(
            model, replace(config, **settings)
        )
    }


def all_but_the_last(model: Any, config: Any) -> list[Target]:
    return select_targets(model, config)[:-1]


def linears_of_first_blocks(model: Any, num_layers: int) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in reversed(model.named_modules())
        if isinstance(module, nn.Linear) and f"{name}.".startswith("model.layers.")
        if num_layers == -1 or int(name.split(".")[2]) < num_layers
    }


def with_unread_rows(self: Any, x_BTI: mx.array) -> mx.array:
    a_IR = self.lora_a.reshape(self.lora_a.shape[::-1]).T  # the numbers of (I, R) read as (R, I)
    return self.linear(x_BTI) + self.scale * ((x_BTI @ a_IR) @ self.lora_b)


def add_lora_then_freeze(model: Any, config: Any) -> None:
    add_lora(model, config)
    model.freeze()


def init_in_half(self: Any, *arguments: Any) -> None:
    init_trainer(self, *arguments)
    rounded = tree_map(lambda p: p.astype(mx.float16).astype(p.dtype), self.model.trainable_parameters())
    self.model.update(rounded)


def without_bias(self: Any, x_BTI: mx.array) -> mx.array:
    return x_BTI @ self.linear.weight.T + self.scale * ((x_BTI @ self.lora_a) @ self.lora_b)


def dora(direction: Callable[[Any, mx.array], mx.array], bias_too: bool = False) -> Patches:
    """DoRA with a broken direction V x."""

    def call(self: Any, x_BTI: mx.array) -> mx.array:
        bias = self.linear.bias if "bias" in self.linear else 0.0
        y_BTO = direction(self, x_BTI) + (bias if bias_too else 0.0)
        return self.magnitude / self.length_O() * y_BTO + (0.0 if bias_too else bias)

    return {"mlx_impl.lora.DoRALinear.__call__": call}


def whole(self: Any, x_BTI: mx.array) -> mx.array:
    return x_BTI @ self.linear.weight.T + self.scale * ((x_BTI @ self.lora_a) @ self.lora_b)


def without_alpha(self: Any, x_BTI: mx.array) -> mx.array:
    return x_BTI @ self.linear.weight.T + (x_BTI @ self.lora_a) @ self.lora_b


MUTANTS = [
    Mutant(
        "scale-is-alpha",
        2,
        "The update is multiplied by alpha, not by alpha / rank: rank times too strong, and it diverges.",
        each_target(lambda target: replace(target, scale=target.scale * target.rank)),
        "mlx-vlm#841",
    ),
    Mutant(
        "alpha-ignored",
        2,
        "The trainer uses its own `scale`; the user's `alpha` is accepted and never read.",
        each_target(lambda target: replace(target, scale=20.0)),
        "mlx-examples#982",
    ),
    Mutant(
        "rslora-ignored",
        2,
        "use_rslora is set, and the scale is still alpha / rank.",
        ignoring(use_rslora=False),
        "peft#2733",
        ("rslora",),
    ),
    Mutant(
        "rank-pattern-ignored",
        2,
        "rank_pattern is ignored: linears with a rank of their own get the common one.",
        ignoring(rank_pattern={}),
        "peft#1930",
        ("patterns",),
    ),
    Mutant(
        "alpha-pattern-ignored",
        2,
        "alpha_pattern is ignored: linears with an alpha of their own get the common one.",
        ignoring(alpha_pattern={}),
        "peft#2195",
        ("patterns",),
    ),
    Mutant(
        "num-layers-ignored",
        2,
        "num_layers asks for the last 8 layers; all 16 are trained and saved.",
        ignoring(num_layers=-1),
        "mlx-examples#1328",
        ("last layer",),
    ),
    Mutant(
        "first-layers-for-last",
        2,
        "The first N layers get an adapter instead of the last N.",
        {"mlx_impl.targets.linears_of_last_blocks": linears_of_first_blocks},
        cases=("last layer",),
    ),
    Mutant(
        "last-linear-forgotten",
        2,
        "A loop ends one too early, so the last linear has no adapter.",
        {"mlx_impl.lora.select_targets": all_but_the_last},
    ),
    Mutant(
        "adapter-not-in-the-path",
        2,
        "The adapter is loaded, listed and counted, but the forward pass never calls it.",
        lora_call(lambda self, x: self.linear(x)),
        "Soup#392",
        trainer=PLAIN,
    ),
    Mutant(
        "factor-not-transposed",
        2,
        "A factor stored as (I, R) is read as (R, I) without a transpose; only the size agrees.",
        lora_call(with_unread_rows),
        "vmlx-swift#320",
        trainer=PLAIN,
    ),
    Mutant(
        "adapter-frozen-too",
        2,
        "freeze() is called after the adapter is added, and freezes the adapter with the rest.",
        {"tests.trainers.mlx_impl.add_lora": add_lora_then_freeze},
        "textpolicy#45",
    ),
    Mutant(
        "gradients-of-everything",
        2,
        "mx.value_and_grad on a model: a module is a dict of all its parameters, so frozen ones get "
        "gradients too.",
        {"mlx.nn.value_and_grad": lambda model, function: mx.value_and_grad(function)},
        trainer=PLAIN,
    ),
    Mutant(
        "factors-in-half",
        2,
        "Loading silently rounds the factors to half precision.",
        {"tests.trainers.mlx_impl.MlxTrainer.__init__": init_in_half},
        "peft#1706",
    ),
    Mutant(
        "bias-lost-in-the-adapter",
        2,
        "An adapted layer multiplies by its base's weight and forgets its bias.",
        lora_call(without_bias),
        cases=("qkv bias",),
        trainer=PLAIN,
    ),
    Mutant(
        "dora-scales-the-bias",
        2,
        "DoRA scales the whole output of the layer, including the bias.",
        dora(whole, bias_too=True),
        cases=("dora with bias",),
    ),
    Mutant(
        "dora-ignores-alpha",
        2,
        "DoRA's direction uses A B without the scale, so alpha has no effect.",
        dora(without_alpha),
        "fsdp_qlora#68",
        ("dora",),
    ),
    Mutant(
        "dora-adds-the-base-twice",
        2,
        "DoRA's result already includes the base layer's output, and is added to it again.",
        dora(lambda self, x: whole(self, x) + x @ self.linear.weight.T),
        "peft#1474",
        ("dora",),
    ),
    Mutant(
        "dora-length-of-the-base",
        2,
        "DoRA divides by the length of W alone, so the magnitude is no longer the length of the merged row.",
        {
            "mlx_impl.lora.DoRALinear.length_O": lambda self: mx.stop_gradient(
                mx.linalg.norm(self.linear.weight, axis=1)
            )
        },
        cases=("dora",),
    ),
]
