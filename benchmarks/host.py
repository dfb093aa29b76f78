"""What the host does for one token: build its graph in Python, then queue it on the device, step by step.

Between two calls of `mx.async_eval` a generator waits for the token before and builds the next one's graph.
With calls that wait, nothing is left to wait for in between: that time is the building. Without, the time in
the calls is the queueing, on a GPU. A step is a primitive of MLX; most, not all, are a kernel.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Answer = Callable[[int], object]  # of so many new tokens
COUNTED = 3  # the call whose graph is counted: what is made once an answer is there by then


def host_of_a_token(answer: Answer, tokens: int) -> str:
    """Milliseconds of building + queueing, medians over an answer's tokens, and the steps of a graph."""
    with calls_of_async_eval(waiting=True) as (calls, steps):
        answer(tokens)
    starts, ends = zip(*calls, strict=True)
    building = [start - end for start, end in zip(starts[1:], ends, strict=False)]
    with calls_of_async_eval(waiting=False) as (calls, _):
        answer(tokens)
    queueing = [end - start for start, end in calls[1:]]
    return f"{1e3 * statistics.median(building):.2f} + {1e3 * statistics.median(queueing):.2f}, {steps[0]}"


@contextmanager
def calls_of_async_eval(waiting: bool) -> Iterator[tuple[list[tuple[float, float]], list[int]]]:
    """The start and the end of each call of `mx.async_eval` within the block, which waits if asked to.

    Calls that wait also count the steps of one graph.
    """
    import mlx.core as mx

    original = mx.async_eval
    calls: list[tuple[float, float]] = []
    steps: list[int] = []

    def recorded(*arrays: Any) -> None:
        start = time.perf_counter()
        if waiting and len(calls) == COUNTED:
            steps.append(steps_of(arrays))
        (mx.eval if waiting else original)(*arrays)
        calls.append((start, time.perf_counter()))

    mx.async_eval = recorded
    try:
        yield calls, steps
    finally:
        mx.async_eval = original


def steps_of(arrays: Any) -> int:
    """The primitives of a graph that is not evaluated."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *(array for _, array in tree_flatten(arrays)))
        return len(re.findall(r'label ?="[A-Za-z]+"', file.read_text(encoding="utf-8")))
