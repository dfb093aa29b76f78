"""Steps taken in turn, forwards and then backwards (ABBA, ABCCBA), so that drift affects all sides alike.

The times of two sides in round k form a pair. A side is a function that does one step, waits for it and
returns its seconds: `timed` makes one from a step in this process, `worker.Side.seconds` is one in another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=str)
Timed = Callable[[], float]


def timed(step: Callable[[], object]) -> Timed:
    """`step` must block until its work is done: in MLX it ends with `mx.eval` and `mx.synchronize`."""

    def seconds() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return seconds


def interleave(sides: Mapping[Name, Timed], num_rounds: int) -> dict[Name, list[float]]:
    """The seconds of each side, one per round."""
    seconds: dict[Name, list[float]] = {name: [] for name in sides}
    for round_ in range(num_rounds):
        order = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
        for name in order:
            seconds[name].append(sides[name]())
    return seconds


def abba(a: Timed, b: Timed, num_pairs: int) -> tuple[list[float], list[float]]:
    """The paired seconds that `gate.judge` needs."""
    seconds = interleave({"a": a, "b": b}, num_pairs)
    return seconds["a"], seconds["b"]
