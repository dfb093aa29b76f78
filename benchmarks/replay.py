"""Reports seconds that were measured in turn to pytest-benchmark, as if it had measured them itself.

pytest-benchmark times one function after another, but compared steps must alternate. So its timer is a clock
that moves only when a measured time is replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Clock:
    """A timer for `@pytest.mark.benchmark(timer=...)`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def replay(benchmark: Any, seconds: Sequence[float], **extra_info: object) -> None:
    """`benchmark` is the fixture; `extra_info` goes into `--benchmark-json`."""
    left = iter(seconds)

    def play() -> None:
        CLOCK.now += next(left)

    benchmark.extra_info.update(extra_info)
    benchmark.pedantic(play, rounds=len(seconds), iterations=1)
