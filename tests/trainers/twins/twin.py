"""What a red twin is: a trainer that is `mlx_impl` but for one small break."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from mlx_impl.train import train

Patches = Mapping[str, Any]  # dotted name, in the module that uses it -> what stands there instead


@dataclass(frozen=True)
class Twin:
    """One bug, and the rung whose claim it breaks while every lower rung's claims still hold."""

    name: str
    rung: int
    story: str
    patches: Patches
    source: str = ""  # the public bug that it stands for, where there is one
    cases: tuple[str, ...] = ()  # those of the ladder's cases that it needs beside "untied"
    least: float = 10.0  # so many tolerances at least is the claim out that catches it, where it has one

    @contextmanager
    def planted(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, value in self.patches.items():
                stack.enter_context(patch(name, value))
            yield


def lora_call(broken: Callable[[Any, Any], Any]) -> Patches:
    """Another `LoRALinear.__call__`, which is what runs once no linear is computed with its neighbours."""
    return {
        "mlx_impl.lora.LoRALinear.__call__": broken,
        "mlx_impl.fast.projection.low_rank_of": lambda linear: None,
    }


def with_add_up(make: Callable[[Any], Callable]) -> Patches:
    """Another sum over a window's batches, made anew for each run from its configuration."""

    def run(model: Any, optimizer: Any, windows: Any, config: Any, *rest: Any) -> Iterator[Any]:
        with patch("mlx_impl.train.add_up", make(config)):
            yield from train(model, optimizer, windows, config, *rest)

    return {"tests.trainers.mlx_impl.train": run}
