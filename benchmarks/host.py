"""What the host does for one token: build its graph in Python, then queue it on the device.

Between two calls of `mx.async_eval` a generator waits for the token before and builds the next one's graph.
With calls that wait, nothing is left to wait for in between: that time is the building. Without, the time in
the calls is the queueing, on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def milliseconds_of_a_token(answer: Callable[[int], object], tokens: int) -> str:
    """The medians over an answer's tokens, building + queueing."""
    with calls_of_async_eval(waiting=True) as calls:
        answer(tokens)
    starts, ends = zip(*calls, strict=True)
    building = [start - end for start, end in zip(starts[1:], ends, strict=False)]
    with calls_of_async_eval(waiting=False) as calls:
        answer(tokens)
    queueing = [end - start for start, end in calls[1:]]
    return f"{1e3 * statistics.median(building):.2f} + {1e3 * statistics.median(queueing):.2f}"


@contextmanager
def calls_of_async_eval(waiting: bool) -> Iterator[list[tuple[float, float]]]:
    """The start and the end of each call of `mx.async_eval` within the block, which waits if asked to."""
    import mlx.core as mx

    original, calls = mx.async_eval, []

    def recorded(*arrays: Any) -> None:
        start = time.perf_counter()
        (mx.eval if waiting else original)(*arrays)
        calls.append((start, time.perf_counter()))

    mx.async_eval = recorded
    try:
        yield calls
    finally:
        mx.async_eval = original
