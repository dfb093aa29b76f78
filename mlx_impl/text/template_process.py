"""A process of its own for somebody else's program, whose time and memory this one watches.

It is asked in a line of JSON and answers in lines of JSON: nothing else that comes from it is believed. No
limit of the system would do: macOS enforces none on memory, and a function in C is not interrupted.
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

MAX_SECONDS = 3  # of CPU time for a rendering; on the clock it would depend on what else runs
MAX_BYTES = 2**30  # resident
MAX_SPARE_BYTES = 2**27  # of a process that is kept for another template
MAX_WAIT = 60  # seconds on the clock in which nothing is heard
LOOK = 0.02  # seconds between two looks at a process that is at work
MAX_RECEIVED = 2**28  # bytes: a text of 2**24 characters may take six times as many
END = b"\n0\n"  # how the answers to a line end

TOO_LONG = f"the chat template must render in {MAX_SECONDS} seconds of CPU time, and takes longer"
TOO_MUCH = f"the chat template must keep within {MAX_BYTES // 2**30} GiB of memory, and takes more"
SILENT = f"the chat template must render in {MAX_WAIT} seconds, and takes longer"

# It finds what this process finds, by the same paths, without `site`; this package by its own place, since
# a path may be relative and the folder another by now.
PROGRAM = (
    "import importlib, sys, typing; sys.path[:] = sys.argv[1:]; import mlx_impl; del sys.path[0]; "
    "from mlx_impl.text.template_worker import serve; serve()"
)
COMMAND = (sys.executable, "-P", "-S", "-c", PROGRAM, str(Path(__file__).resolve().parents[2]))


class BrokenRule(Exception):
    """For which the process is ended."""


class WatchedProcess:
    """Started again after Ctrl-C and where this process is forked, but never after a rule was broken."""

    def __init__(self, first: bytes) -> None:
        self.first = first  # the line that it is told whenever it starts
        self.lock, self.broken = threading.Lock(), ""
        self.opening = self.start()

    def ask(self, line: bytes) -> list[Any]:
        """The answers: fewer than asked for where a rule was broken, and the next question is refused."""
        with self.lock:
            if self.broken:
                raise ValueError(self.broken)
            if self.owner != os.getpid():
                self.start()
            return self.exchange(line)

    def start(self) -> list[Any]:
        with interrupt_held():  # and it is in the new process: Ctrl-C is for this one
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
        self.ready = select.poll()
        self.ready.register(self.output, select.POLLIN)
        self.watched, self.next_look, self.num_looks = psutil.Process(self.child.pid), 0.0, 0
        self.used = self.used_before = 0.0  # seconds of CPU time: at the last look, and when last heard
        return self.exchange(self.first)

    def exchange(self, line: bytes) -> list[Any]:
        received = bytearray()
        try:
            self.send(line)
            self.receive(received)
        except BrokenRule as error:
            self.end()
            self.broken = str(error)
        except BaseException:  # Ctrl-C: its answer would be taken for that to the next question
            self.end()
            self.owner = 0
            raise
        answers = [json.loads(part) for part in bytes(received).split(b"\n")[:-1] if part not in (b"", b"0")]
        if self.broken and not answers:
            raise ValueError(self.broken)
        return answers

    def send(self, line: bytes) -> None:
        """All of it is read before anything is rendered, so that neither waits for the other."""
        try:
            sent = os.write(self.input, line)
            while sent < len(line):
                sent += os.write(self.input, line[sent : sent + 2**16])
        except BrokenPipeError:
            raise self.ended() from None

    def receive(self, received: bytearray) -> None:
        """Whatever comes, the time of a rendering begins anew: an empty line says no more than that."""
        while not received.endswith(END):
            is_ready = self.ready.poll(1000 * LOOK)
            if time.monotonic() >= self.next_look:
                self.look()
            if is_ready:
                part = os.read(self.output, 2**16)
                received += part
                self.used_before, self.num_looks = self.used, 0
                if not part or len(received) > MAX_RECEIVED:
                    raise self.ended()

    def look(self) -> None:
        self.next_look = time.monotonic() + LOOK
        try:
            times, memory = self.watched.cpu_times(), self.watched.memory_info()
        except psutil.Error:  # it has ended, which is seen where it is read
            return
        self.used, self.num_looks = times.user + times.system, self.num_looks + 1
        if memory.rss > MAX_BYTES:
            raise BrokenRule(TOO_MUCH)
        if self.used - self.used_before > MAX_SECONDS:
            raise BrokenRule(TOO_LONG)
        if self.num_looks * LOOK > MAX_WAIT:  # not by the clock, which goes on where both are stopped
            raise BrokenRule(SILENT)

    def ended(self) -> BrokenRule:
        """By itself, by its own last limits, or by somebody else."""
        self.end()
        status = self.child.returncode
        if status == -signal.SIGPROF:
            return BrokenRule(TOO_LONG)
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return BrokenRule(f"the process that renders the chat template has ended {how}")


SPARE: list[WatchedProcess] = []  # at most one, which has no template any more: to start one takes 0.1 s


def watched_process(first: bytes) -> WatchedProcess:
    """One that has been told this line."""
    with suppress(IndexError):
        spare = SPARE.pop()
        if spare.owner == os.getpid() and spare.child.poll() is None:
            spare.first, spare.opening = first, spare.ask(first)
            return spare
    return WatchedProcess(first)


def give_back(process: WatchedProcess) -> None:
    """For the next template, if there is no spare one and this one holds little memory."""
    with suppress(psutil.Error):
        if not process.broken and not SPARE and process.watched.memory_info().rss < MAX_SPARE_BYTES:
            SPARE.append(process)
            return
    process.end()


def end(child: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


@contextmanager
def interrupt_held() -> Iterator[None]:
    """SIGINT comes when the block has ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
