"""Tests the gate with this machine's noise: a step against itself, and against a slower one.

The step computes loss and gradient of a small network several times. The planted slowdown is exact: the same
work 23 times instead of 20.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .gate import Verdict, judge
from .interleave import abba, timed

PARTS = 20  # repetitions in a step
WIDTH = 32


@dataclass(frozen=True)
class Trial:
    verdicts: list[Verdict]
    step_seconds: list[float]

    @property
    def num_failures(self) -> int:
        return sum(verdict.is_failure for verdict in self.verdicts)


def step_of(num_parts: int) -> Callable[[], object]:
    """Loss and gradient `num_parts` times, evaluated together."""
    import mlx.core as mx

    x_TD, w_DD = mx.random.normal((2, WIDTH, WIDTH))
    mx.eval(x_TD, w_DD)
    part = mx.value_and_grad(lambda w_DD: mx.logsumexp(mx.tanh(x_TD @ w_DD) @ w_DD, axis=-1).sum())

    def step() -> None:
        mx.eval([part(w_DD) for _ in range(num_parts)])
        mx.synchronize()

    return step


def try_gate(extra_parts: int, num_tries: int, num_pairs: int) -> Trial:
    """`num_tries` verdicts on a step with extra parts against one without."""
    slow, step = timed(step_of(PARTS + extra_parts)), timed(step_of(PARTS))
    for _ in range(10):
        slow(), step()
    verdicts = [judge(partial(abba, slow, step), at_most=1.0, num_pairs=num_pairs) for _ in range(num_tries)]
    return Trial(verdicts, [step() for _ in range(num_pairs)])
