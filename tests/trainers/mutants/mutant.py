"""A mutant: `mlx_impl` with one small bug."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from mlx_impl.train import train
from tests.ring import PLANTED

Patches = Mapping[str, Any]  # dotted name, in the module that uses it -> its replacement
SHIPPED, PLAIN = "mlx_impl", "plain"  # the two trainers, by their `--trainer` names


@dataclass(frozen=True)
class Mutant:
    """One bug in one trainer, and the rung that must catch it while all lower rungs pass."""

    name: str
    rung: int
    story: str
    patches: Patches
    source: str = ""  # the public bug that it stands for, where there is one
    cases: tuple[str, ...] = ()  # the ladder's cases that it needs besides "untied" and "lora"
    trainer: str = SHIPPED  # PLAIN: a bug in code that only the plain trainer runs
    least: float = 10.0  # how many tolerances the claim that catches it must be off, if it has one

    @contextmanager
    def planted(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, value in self.patches.items():
                stack.enter_context(patch(name, value))
            stack.enter_context(patch.dict(os.environ, {PLANTED: self.name}))
            yield


def lora_call(broken: Callable[[Any, Any], Any]) -> Patches:
    """A broken `LoRALinear.__call__`."""
    return {"mlx_impl.lora.LoRALinear.__call__": broken}


def training(broken: Callable[..., Iterator[Any]]) -> Patches:
    """A broken training loop in `LoRATrainer`."""
    return {"mlx_impl.run.trainer.train": broken}


def with_add_up(make: Callable[[Any], Callable]) -> Patches:
    """A broken sum over an update's micro-batches. `make` builds it for each run from its configuration."""

    def run(model: Any, optimizer: Any, windows: Any, config: Any, **more: Any) -> Iterator[Any]:
        yield from train(model, optimizer, windows, config, **more | {"reduce": make(config)})

    return training(run)
