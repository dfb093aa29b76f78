"""One run: the trainers of a case take turns. The result serves the table and the tests."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from .cases import Case
from .contestants import named_entry
from .flops import StepFlops, Work, matmul_rate, utilisation
from .gate import Ratio, ratio_of
from .interleave import interleave
from .peak import Peak
from .worker import Hello, Side

RATE = "matmul"  # the contestant that measures the machine's matmul rate


@dataclass(frozen=True)
class Result:
    """Times and memory of one trainer."""

    name: str
    seconds: list[float]  # of each step after warm-up
    first_step_seconds: float
    first_loss_nats: float
    peak: Peak
    blas: str

    @property
    def title(self) -> str:
        return named_entry(self.name).title

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Run:
    case: Case
    work: Work
    flops: StepFlops
    rate: float  # FLOPs per second of a matrix multiplication, measured between the steps
    load: float  # load average over the minute before
    results: dict[str, Result]

    @property
    def floor_seconds(self) -> float:
        """The step's model FLOPs at the measured matmul rate."""
        return self.flops.total / self.rate

    @property
    def floor_seconds_of_distinct(self) -> float:
        """The same with shared prefixes computed once."""
        return (self.flops.total - self.flops.repeated) / self.rate

    def ratio(self, name: str, other: str) -> Ratio:
        return ratio_of(self.results[name].seconds, self.results[other].seconds)

    def mfu(self, name: str) -> float:
        return utilisation(self.flops.total, self.results[name].step_seconds, self.rate)

    def tokens_per_second(self, name: str) -> float:
        return self.work.num_tokens / self.results[name].step_seconds

    def targets_per_second(self, name: str) -> float:
        return self.work.num_targets / self.results[name].step_seconds


@contextmanager
def opened(
    names: Sequence[str], case: Case, environment: dict[str, str] | None = None
) -> Iterator[dict[str, Side]]:
    """One `Side` per name, each past its first step; closed at the end."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Side(name, case, environment)) for name in names}


def warm_up(sides: dict[str, Side], case: Case) -> None:
    """Does every update once, so that every batch shape has been compiled."""
    interleave({name: side.seconds for name, side in sides.items()}, case.num_windows)


def measure(case: Case, names: Sequence[str], num_steps: int) -> Run:
    """`num_steps` steps of each trainer in turn after warm-up, then its peak over all the case's updates."""
    load = os.getloadavg()[0]
    with opened([*names, RATE], case) as sides:
        warm_up(sides, case)
        seconds = interleave({name: side.seconds for name, side in sides.items()}, num_steps)
        peaks = {name: sides[name].peak(case.num_windows) for name in names}
        hellos = {name: side.hello for name, side in sides.items()}
    rate = matmul_rate(hellos[RATE].is_gpu, statistics.median(seconds[RATE]))
    results = {name: result_of(name, hellos[name], seconds[name], peaks[name]) for name in names}
    return Run(case, hellos[RATE].work, hellos[RATE].flops, rate, load, results)


def measure_as_installed(case: Case, num_steps: int = 2) -> Run:
    """Ours, which finds a fast BLAS, beside mlx-lm with the slow BLAS that MLX ships. A few steps."""
    load = os.getloadavg()[0]
    own_blas = {"MLX_IMPL_BLAS": "off"}
    with opened(["ours", RATE], case) as sides, opened(["mlx-lm"], case, own_blas) as slow:
        both = {**sides, **slow}
        sides["ours"].seconds()
        seconds = interleave({name: side.seconds for name, side in both.items()}, num_steps)
        peaks = {name: side.peak(1) for name, side in both.items()}
        hellos = {name: side.hello for name, side in both.items()}
    rate = matmul_rate(hellos[RATE].is_gpu, statistics.median(seconds[RATE]))
    results = {n: result_of(n, hellos[n], seconds[n], peaks[n]) for n in ("ours", "mlx-lm")}
    return Run(case, hellos[RATE].work, hellos[RATE].flops, rate, load, results)


def result_of(name: str, hello: Hello, seconds: list[float], peak: Peak) -> Result:
    return Result(name, seconds, hello.first_step_seconds, hello.first_loss_nats, peak, hello.blas)
