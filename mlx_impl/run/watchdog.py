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

PATIENCE = 10.0  # seconds at least that a rank which was told to stop waits for the others to agree
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
    """Ends the process after `timeout` seconds of waiting, or `patience` seconds after a signal.

    Two threads, a pipe and Python's wake-up file descriptor are its own until `close`.
    """

    def __init__(self, who: str, timeout: float) -> None:
        self.who, self.timeout = who, timeout
        self.since: float | None = None  # when the main thread began to wait
        self.waited = time.monotonic()  # when it last ended to wait
        self.longest = 0.0  # seconds of the longest part so far, its own between two waits or the others'
        self.signalled: tuple[int, float] | None = None  # a signal's number, and when it came
        self.has_trained = False
        self.closed = threading.Event()
        self.threads = [threading.Thread(target=self.watch, daemon=True)]
        self.pipe: tuple[int, int] | None = None
        self.heard_before = -1  # the wake-up file descriptor of who listened before
        if threading.current_thread() is threading.main_thread():  # which alone gets signals
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[1], False)
            # written to at once, whatever the thread does
            self.heard_before = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            self.threads.append(threading.Thread(target=self.listen, args=(self.pipe[0],), daemon=True))
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """End the threads. Of several in one process the last that was made is closed first.

        Raises RuntimeError, and ends nothing, in another thread than the main one that made it.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if self.pipe is not None and not is_main:  # which alone may set the wake-up file descriptor
            raise RuntimeError("only the main thread can close the ranks that it has joined")
        self.closed.set()
        if self.pipe is not None:
            signal.set_wakeup_fd(self.heard_before, warn_on_full_buffer=False)
            os.close(self.pipe[1])
        for thread in self.threads:
            thread.join()
        if self.pipe is not None:
            os.close(self.pipe[0])
        self.threads, self.pipe = [], None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.begin_wait(time.monotonic())
        try:
            yield
        finally:
            self.end_wait(time.monotonic())

    def begin_wait(self, now: float) -> None:
        self.longest = max(self.longest, now - self.waited)
        self.since = now

    def end_wait(self, now: float) -> None:
        if self.since is not None:
            self.longest = max(self.longest, now - self.since)
        self.since, self.waited = None, now

    def begin_training(self) -> None:
        """A program that trains again has dealt with the signals that came before."""
        if self.has_trained:
            self.signalled = None
        self.has_trained = True

    @property
    def patience(self) -> float:
        """Seconds that a rank which was told to stop waits for the others: a slow one is not lost."""
        return min(max(PATIENCE, 2 * self.longest), self.timeout)

    def listen(self, pipe: int) -> None:
        while number := os.read(pipe, 1):
            if number[0] in STOPPING:
                self.signalled = number[0], time.monotonic()
            if self.heard_before >= 0:
                with suppress(OSError):
                    os.write(self.heard_before, number)

    def watch(self) -> None:
        while not self.closed.wait(0.5):
            if found := self.verdict(time.monotonic()):
                self.end(*found)

    def verdict(self, now: float) -> tuple[str, int] | None:
        """Why the process should end, and its exit code; None where it should not."""
        since, signalled = self.since, self.signalled
        if since is None:
            return None
        if signalled is not None and now - max(since, signalled[1]) > self.patience:
            name = signal.Signals(signalled[0]).name
            return f"stopped by {name}: no other rank answers", 128 + signalled[0]
        if now - since > self.timeout:
            return f"no answer from another rank within {self.timeout:g} s", EXIT_LOST
        return None

    def end(self, reason: str, code: int) -> None:
        with suppress(OSError):
            sys.stderr.write(f"error: {self.who}: {reason}\n")
            sys.stderr.flush()
        os._exit(code)
