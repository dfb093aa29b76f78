"""Ends a process whose other ranks do not answer: a thread that watches how long the main thread waits.

A rank that waits in a collective computes nothing and handles no signal: Python runs signal handlers only
between its own instructions. `mlx.launch` sends SIGTERM and never SIGKILL, so such a rank would live on.
While the ranks find one another MLX holds Python's lock, and no thread can watch: see `without_python`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 10.0  # seconds that a rank which was told to stop waits for the others to agree
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_LOST = 1


class RankLost(RuntimeError):
    """Another rank has ended."""


@contextmanager
def without_python(seconds: float) -> Iterator[None]:
    """For a call that holds Python's lock: after so many seconds its system calls fail; a signal ends all.

    The operating system then does what handlers of Python would do too late. Nothing is lost by it, because
    a rank that has not met the others has begun nothing.
    """
    if threading.current_thread() is not threading.main_thread():  # only that thread may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    alarm = signal.signal(signal.SIGALRM, lambda *_: None)  # a wait that it interrupts fails with EINTR
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, alarm)
        for number in handled:
            signal.signal(number, before[number])


class Watchdog:
    """Ends the process after `timeout` seconds of waiting, or PATIENCE seconds after a signal."""

    def __init__(self, who: str, timeout: float) -> None:
        self.who, self.timeout = who, timeout
        self.since: float | None = None  # when the main thread began to wait
        self.signalled: tuple[int, float] | None = None  # a signal's number, and when it came
        self.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def start(self) -> None:
        threading.Thread(target=self.watch, daemon=True).start()
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread gets signals
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # written to at once, whatever the thread does
        threading.Thread(target=self.listen, args=(read,), daemon=True).start()

    def listen(self, pipe: int) -> None:
        while number := os.read(pipe, 1):
            if number[0] in STOPPING:
                self.signalled = number[0], time.monotonic()

    def watch(self) -> None:
        while True:
            time.sleep(0.5)
            since, now = self.since, time.monotonic()
            if since is None:
                continue
            if self.signalled is not None and now - max(since, self.signalled[1]) > PATIENCE:
                number = self.signalled[0]
                self.end(f"stopped by {signal.Signals(number).name}: no other rank answers", 128 + number)
            if now - since > self.timeout:
                self.end(f"no answer from another rank within {self.timeout:g} s", EXIT_LOST)

    def end(self, reason: str, code: int) -> None:
        with suppress(OSError):
            sys.stderr.write(f"error: {self.who}: {reason}\n")
            sys.stderr.flush()
        os._exit(code)
