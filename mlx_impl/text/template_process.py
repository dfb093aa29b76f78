"""A worker process that runs a template, with limits on its CPU time and memory.

Requests and answers are lines of JSON; nothing else from the worker is trusted. The parent watches the worker
because the system's own limits are not enough: macOS enforces none on memory, and Python cannot interrupt a
function written in C.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

MAX_CPU_SECONDS = 3  # of one rendering; CPU time, since wall-clock time depends on what else runs
MAX_BYTES = 2**30  # resident memory
MAX_SPARE_BYTES = 2**27  # resident memory of a process that is kept for the next template
MAX_SILENT_SECONDS = 60  # wall-clock time without any output
CHECK_SECONDS = 0.02  # between two checks of the limits
MAX_ANSWER_BYTES = 2**28  # a text of 2**24 characters can take six times as many bytes in JSON
END = b"\n0\n"  # ends the answers to a request

TOO_SLOW = f"the chat template must render in {MAX_CPU_SECONDS} seconds of CPU time, and takes longer"
TOO_LARGE = f"the chat template must keep within {MAX_BYTES // 2**30} GiB of memory, and takes more"
SILENT = f"the chat template must render in {MAX_SILENT_SECONDS} seconds, and takes longer"

# The worker gets this process's import paths and skips `site`. This package is imported by its own absolute
# path, because a path may be relative and the working directory may have changed.
PROGRAM = (
    "import importlib, sys, typing; sys.path[:] = sys.argv[1:]; import mlx_impl; del sys.path[0]; "
    "from mlx_impl.text.template_worker import serve; serve()"
)
COMMAND = (sys.executable, "-P", "-S", "-c", PROGRAM, str(Path(__file__).resolve().parents[2]))


class WorkerFailed(Exception):
    """The worker exceeded a limit or ended by itself."""


class WatchedProcess:
    """Restarts after Ctrl-C and after a fork of this process, but refuses all requests after a failure."""

    def __init__(self, setup: bytes) -> None:
        self.setup = setup  # the first request of every worker: the templates
        self.lock, self.failure = threading.Lock(), ""
        self.setup_answers = self.start()

    def ask(self, line: bytes) -> list[Any]:
        """The answers to a request. Where a limit was exceeded there are fewer, and the next call raises."""
        with self.lock:
            if self.failure:
                raise ValueError(self.failure)
            if self.owner != os.getpid():
                self.start()
            return self.exchange(line)

    def start(self) -> list[Any]:
        with sigint_blocked():  # the worker inherits this, so that Ctrl-C interrupts only the parent
            self.child = subprocess.Popen(
                [*COMMAND, *sys.path],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        self.owner = os.getpid()
        self.end = weakref.finalize(self, end, self.child, self.owner)
        assert self.child.stdin and self.child.stdout
        self.input, self.output = self.child.stdin.fileno(), self.child.stdout.fileno()
        self.poll = select.poll()
        self.poll.register(self.output, select.POLLIN)
        self.watched, self.next_check, self.num_checks = psutil.Process(self.child.pid), 0.0, 0
        self.cpu_seconds = self.cpu_seconds_at_output = 0.0  # at the last check, at the last output
        return self.exchange(self.setup)

    def exchange(self, line: bytes) -> list[Any]:
        received = bytearray()
        try:
            self.send(line)
            self.receive(received)
        except WorkerFailed as error:
            self.end()
            self.failure = str(error)
        except BaseException:  # Ctrl-C: a late answer would be taken for that to the next request
            self.end()
            self.owner = 0
            raise
        answers = [json.loads(part) for part in bytes(received).split(b"\n")[:-1] if part not in (b"", b"0")]
        if self.failure and not answers:
            raise ValueError(self.failure)
        return answers

    def send(self, line: bytes) -> None:
        """The worker reads all of a request before it renders, so sending never waits for an answer."""
        try:
            sent = os.write(self.input, line)
            while sent < len(line):
                sent += os.write(self.input, line[sent : sent + 2**16])
        except BrokenPipeError:
            raise self.exit_reason() from None

    def receive(self, received: bytearray) -> None:
        """Read until END. Any output, even an empty line, starts the time limit anew."""
        while not received.endswith(END):
            has_output = self.poll.poll(1000 * CHECK_SECONDS)
            if time.monotonic() >= self.next_check:
                self.check_limits()
            if has_output:
                part = os.read(self.output, 2**16)
                received += part
                self.cpu_seconds_at_output, self.num_checks = self.cpu_seconds, 0
                if not part or len(received) > MAX_ANSWER_BYTES:
                    raise self.exit_reason()

    def check_limits(self) -> None:
        self.next_check = time.monotonic() + CHECK_SECONDS
        try:
            times, memory = self.watched.cpu_times(), self.watched.memory_info()
        except psutil.Error:  # it has ended: `receive` finds out
            return
        self.cpu_seconds, self.num_checks = times.user + times.system, self.num_checks + 1
        if memory.rss > MAX_BYTES:
            raise WorkerFailed(TOO_LARGE)
        if self.cpu_seconds - self.cpu_seconds_at_output > MAX_CPU_SECONDS:
            raise WorkerFailed(TOO_SLOW)
        if self.num_checks * CHECK_SECONDS > MAX_SILENT_SECONDS:  # checks do not count while both are stopped
            raise WorkerFailed(SILENT)

    def exit_reason(self) -> WorkerFailed:
        """End the worker; the error that says how it ended."""
        self.end()
        status = self.child.returncode
        if status == -signal.SIGPROF:  # the worker's own limit
            return WorkerFailed(TOO_SLOW)
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return WorkerFailed(f"the process that renders the chat template has ended {how}")


SPARE: list[WatchedProcess] = []  # at most one, for the next template: starting a process takes 0.1 s


def acquire_process(setup: bytes) -> WatchedProcess:
    """The spare process or a new one, which has answered this request."""
    with suppress(IndexError):
        spare = SPARE.pop()
        if spare.owner == os.getpid() and spare.child.poll() is None:
            spare.setup, spare.setup_answers = setup, spare.ask(setup)
            return spare
    return WatchedProcess(setup)


def release_process(process: WatchedProcess) -> None:
    """Keep it as the spare process if there is none and it holds little memory; else end it."""
    with suppress(psutil.Error):
        if not process.failure and not SPARE and process.watched.memory_info().rss < MAX_SPARE_BYTES:
            SPARE.append(process)
            return
    process.end()


def end(child: subprocess.Popen[bytes], owner: int) -> None:
    """Kill the worker, unless this is a fork of the process that started it."""
    if os.getpid() == owner:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """A SIGINT that arrives inside the block is delivered after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
