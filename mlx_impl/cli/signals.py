"""Ctrl-C, `kill` and a closed terminal: handled as requests to stop, so that a run can save first.

Source: signal(7). A program that one of these signals ends exits with 128 + the signal's number.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]


class StoppedBySignal(KeyboardInterrupt):
    """One of SIGNALS arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """The number of the signal that asked to stop; None until one arrives."""

    signal_number: int | None = None


@contextmanager
def handle_signals(handler: Handler) -> Iterator[None]:
    """Within the block SIGNALS call the handler; an ignored signal stays ignored, as `nohup` requires."""
    if threading.current_thread() is not threading.main_thread():  # only that thread may set handlers
        yield
        return
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def raise_stopped(number: int, frame: FrameType | None) -> None:
    redirect_closed_streams(number)
    raise StoppedBySignal(number)


@contextmanager
def defer_signals() -> Iterator[StopRequest]:
    """Within the block a signal only sets the request; the block checks it where it can stop.

    After a signal the end of the block raises StoppedBySignal. A second signal raises it at once.
    """
    request = StopRequest()

    def set_request(number: int, frame: FrameType | None) -> None:
        redirect_closed_streams(number)
        if request.signal_number is not None:
            raise StoppedBySignal(number)
        request.signal_number = number

    with handle_signals(set_request):
        yield request
    if request.signal_number is not None:
        raise StoppedBySignal(request.signal_number)


def redirect_closed_streams(number: int) -> None:
    """After SIGHUP the terminal may be gone. Send output to /dev/null, or printing would raise OSError."""
    if number == signal.SIGHUP:
        redirect_if(is_gone)


def stop_without_reader() -> None:
    """A rank whose launcher has ended: its output goes nowhere, and it asks to stop as `kill` does."""
    redirect_if(has_no_reader)
    signal.raise_signal(signal.SIGTERM)


def redirect_if(is_closed: Callable[[int], bool]) -> None:
    """Standard output and standard error to /dev/null, each if its file descriptor is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        if is_closed(stream.fileno()):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def is_gone(terminal: int) -> bool:
    try:
        os.write(terminal, b"")
    except OSError:
        return True
    return False


def has_no_reader(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
