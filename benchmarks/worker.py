"""A contestant in its own process, with its own BLAS, memory and first step.

Two frameworks in one process would share the BLAS that was loaded first, and its threads. The parent gives
turns and stops every waiting process (SIGSTOP): OpenMP's threads spin for 200 ms after their last work, and
a step beside them ran at half its speed. On a GPU, untimed steps precede the timed one, because the host's
caches and the GPU's clocks have gone cold since the last turn.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

from .cases import Case
from .contestants import CONTESTANTS, Contestant, build, named_entry
from .flops import StepFlops, Work, step_flops, work_of
from .peak import Peak, measured_peak

STARTING = multiprocessing.get_context("spawn")
PR_SET_PDEATHSIG = 1  # prctl(2)
UNTIMED_ON_A_GPU = 3


@dataclass(frozen=True)
class Hello:
    """What a process reports once its first step is done."""

    first_step_seconds: float
    first_loss_nats: float
    blas: str
    is_gpu: bool
    work: Work
    flops: StepFlops


def prepare(environment: dict[str, str]) -> str:
    """Sets the environment and loads the BLAS, before MLX is imported. Returns a sentence on the BLAS."""
    from mlx_impl.machine.blas import load_optimized_blas

    os.environ.update(environment)
    return load_optimized_blas().sentence


def serve(connection: Connection, name: str, case: Case, environment: dict[str, str]) -> None:
    if sys.platform == "linux":  # a stopped process would outlive a killed parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        answer_to(connection, name, case, environment)
    except EOFError:  # the parent has ended
        pass
    except Exception:
        connection.send(RuntimeError(f"{name}: {traceback.format_exc()}"))


def answer_to(connection: Connection, name: str, case: Case, environment: dict[str, str]) -> None:
    blas = prepare(environment)
    contestant, work, flops = on_its_arrays(name, case)
    start = time.perf_counter()
    loss_nats = contestant.step()
    connection.send(Hello(time.perf_counter() - start, loss_nats, blas, is_gpu(), work, flops))
    num_untimed = UNTIMED_ON_A_GPU if is_gpu() else 0
    while (order := connection.recv()) is not None:
        if order == "step":
            for _ in range(num_untimed):
                contestant.step()
            start = time.perf_counter()
            contestant.step()
            connection.send(time.perf_counter() - start)
        elif isinstance(order, tuple):
            num_steps, is_warm = order
            for _ in range(num_untimed if is_warm else 0):
                contestant.step()
            start = time.perf_counter()
            for _ in range(num_steps):
                contestant.step()
            connection.send(time.perf_counter() - start)
        else:
            connection.send(measured_peak(contestant.step, CONTESTANTS[name].memory, num_steps=order))


def on_its_arrays(name: str, case: Case) -> tuple[Contestant, Work, StepFlops]:
    from .inputs import read_inputs  # imports MLX

    inputs = read_inputs(case)
    work = work_of(inputs.windows)
    return build(name, inputs, case), work, step_flops(inputs.config, case.rank, work)


def is_gpu() -> bool:
    import mlx.core as mx

    return bool(mx.default_device() == mx.gpu)


class Side(AbstractContextManager["Side"]):
    """The parent's handle on a contestant. Raises RuntimeError with its traceback if it fails.

    Unless it `waits`, others can start beside it; `hello` is then to be read before anything is asked.
    """

    def __init__(
        self, name: str, case: Case, environment: dict[str, str] | None = None, waits: bool = True
    ) -> None:
        self.name = name
        is_of_torch = (
            named_entry(name).memory == "torch"
        )  # which brings its own BLAS; MLX only reads the file
        environment = {**({"MLX_IMPL_BLAS": "off"} if is_of_torch else {}), **(environment or {})}
        self.connection, theirs = STARTING.Pipe()
        self.process = STARTING.Process(target=serve, args=(theirs, name, case, environment))
        self.process.start()
        atexit.register(self.process.kill)
        theirs.close()
        if waits:
            self.hello  # noqa: B018

    @cached_property
    def hello(self) -> Hello:
        """What the process reports once its first step is done."""
        hello: Hello = self.answer()
        return hello

    def seconds(self) -> float:
        """The seconds of one step."""
        return float(self.ask("step"))

    def seconds_of(self, num_steps: int, warm: bool = False) -> float:
        """The seconds of so many steps, one after the other; where `warm`, after a GPU's untimed ones."""
        return float(self.ask((num_steps, warm)))

    def peak(self, num_steps: int) -> Peak:
        peak: Peak = self.ask(num_steps)
        return peak

    def ask(self, order: object) -> Any:
        self.signal(signal.SIGCONT)
        self.connection.send(order)
        return self.answer()

    def answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.name}: the process ended with {self.process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        self.signal(signal.SIGSTOP)
        return answer

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        atexit.unregister(self.process.kill)
        self.connection.close()


def call(function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """function(*arguments) in its own process with an optimized BLAS; a function at the top of a module."""
    ours, theirs = STARTING.Pipe()
    process = STARTING.Process(target=run, args=(theirs, function, arguments, environment or {}), daemon=True)
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}: the process ended early") from None
    finally:
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def run(connection: Connection, function: Callable[..., Any], arguments: Any, environment: dict) -> None:
    try:
        prepare(environment)
        connection.send(function(*arguments))
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
