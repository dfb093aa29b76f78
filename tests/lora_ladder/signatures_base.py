"""Known bugs of freezing: which frozen weights move, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlx_impl.config import TrainConfig
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.signatures import Hypothesis, Signature, of_members
from tests.trainers.reference import Run

FACTORS = ("lora_a", "lora_b", "magnitude")


def is_factor(name: str) -> bool:
    return name.endswith(FACTORS)


def base(self: Any, _base: Any) -> Arrays:
    return {n.replace(".linear.", "."): x for n, x in self.numpy().items() if not is_factor(n)}


def trained_too(is_trained: Callable[[str], bool]) -> Hypothesis:
    """Some of the frozen weights train, at the learning rate of A."""

    def begin(self: Any, begin: Callable[[TrainConfig], Run], training: TrainConfig) -> Run:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_factor(name) or is_trained(name))
        return begin(training)

    return of_members(begin=begin, base=base)


def decayed(self: Any, begin: Callable[[TrainConfig], Run], training: TrainConfig) -> Run:
    """The optimizer holds every weight and decays it; the frozen ones have no gradient."""
    run = begin(training)
    frozen = [p for name, p in self.model.named_parameters() if not is_factor(name)]
    right = run.optimizer.step

    @torch.no_grad()
    def step() -> None:
        right()
        for p in frozen:
            p *= 1 - training.learning_rate * training.weight_decay

    run.optimizer.step = step  # type: ignore[assignment]
    return run


def is_norm(name: str) -> bool:
    return "norm" in name


GROUPS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "whole base": ("the whole base trains: it is not frozen", lambda name: True),
    "embedding": ("the embedding trains", lambda name: "embed_tokens" in name),
    "head": ("the head trains", lambda name: "lm_head" in name),
    "embedding and head": (
        "the embedding and the head train",
        lambda name: "embed_tokens" in name or "lm_head" in name,
    ),
    "norms": ("the norms train", is_norm),
    "last norm": ("the norm before the head trains", lambda name: name == "model.norm.weight"),
    "biases": ("the biases train", lambda name: name.endswith("bias")),
    "adapted weights": (
        "the weights of the adapted linears train",
        lambda name: name.endswith(".linear.weight"),
    ),
    "adapted linears": (
        "the adapted linears train with their biases: they are not frozen anew",
        lambda name: ".linear." in name,
    ),
}

SIGNATURES = [
    *(
        Signature(
            f"{name} trained", 7, sentence, trained_too(is_trained), "tests/traps/test_trap_freeze_order.py"
        )
        for name, (sentence, is_trained) in GROUPS.items()
    ),
    Signature(
        "frozen weights decayed",
        7,
        "weight decay moves the frozen weights: the optimizer holds them",
        of_members(begin=decayed, base=base),
        "S-Prompts#2",
    ),
]
