"""Ctrl-C, `kill` and a closed terminal as requests: what is under way is finished and saved first.

Source: signal(7). A program that ends by one of these signals exits with 128 + its number.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]


class Stopped(KeyboardInterrupt):
    """One of SIGNALS came."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Interrupt:
    """Whether one of SIGNALS came, and which."""

    requested: int | None = None


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Within the block SIGNALS call the handler, but for those that are ignored, as `nohup` has it."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    leave_a_closed_terminal(number)
    raise Stopped(number)


@contextmanager
def interrupt_requested() -> Iterator[Interrupt]:
    """Within the block a signal only marks the request; the block looks at it where it can stop.

    The block's end raises Stopped if there was one, and so does a second signal, at once.
    """
    interrupt = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        leave_a_closed_terminal(number)
        if interrupt.requested is not None:
            raise Stopped(number)
        interrupt.requested = number

    with handling(note):
        yield interrupt
    if interrupt.requested is not None:
        raise Stopped(interrupt.requested)


def leave_a_closed_terminal(number: int) -> None:
    """After SIGHUP there may be no terminal: what is printed there would end the program with an error."""
    if number != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            os.write(stream.fileno(), b"")
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
