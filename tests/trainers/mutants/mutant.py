"""What a mutant is: a trainer that is `mlx_impl` but for one small bug."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from mlx_impl.train import train

Patches = Mapping[str, Any]  # dotted name, in the module that uses it -> what replaces it
SHIPPED, PLAIN = "mlx_impl", "plain"  # the two trainers; as `pytest --trainer` calls them


@dataclass(frozen=True)
class Mutant:
    """One bug in the code of one trainer, and the rung that must notice it while the lower rungs pass."""

    name: str
    rung: int
    story: str
    patches: Patches
    source: str = ""  # the public bug that it stands for, where there is one
    cases: tuple[str, ...] = ()  # of the ladder's cases those that it needs beside "untied"
    trainer: str = SHIPPED  # PLAIN: a bug in code that only the plain trainer runs
    least: float = 10.0  # by so many tolerances, at least, the claim that catches it is off, if it has one

    @contextmanager
    def planted(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, value in self.patches.items():
                stack.enter_context(patch(name, value))
            yield


def lora_call(broken: Callable[[Any, Any], Any]) -> Patches:
    """Another `LoRALinear.__call__`."""
    return {"mlx_impl.lora.LoRALinear.__call__": broken}


def training(broken: Callable[..., Iterator[Any]]) -> Patches:
    """Another training loop in `LoRATrainer`."""
    return {"mlx_impl.run.trainer.train": broken}


def with_add_up(make: Callable[[Any], Callable]) -> Patches:
    """Another sum over an update's micro-batches, made anew for each run from its configuration."""

    def run(model: Any, optimizer: Any, windows: Any, config: Any, **more: Any) -> Iterator[Any]:
        yield from train(model, optimizer, windows, config, reduce=make(config), **more)

    return training(run)
