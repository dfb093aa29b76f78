"""Ctrl-C where several ranks train: KeyboardInterrupt on all of them, after the same update.

Raised on one rank alone it would leave the others in a collective, whose next message would be of another
training. So a first Ctrl-C is noted, in the loop over the records too, and the ranks then agree. One that
they can no longer agree on is raised on its own rank, when the records end or the loop is left.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..train import StepRecord
from .ranks import Ranks


class Noted:
    """A handler of Ctrl-C: the first one is noted, and a second one raises KeyboardInterrupt at once."""

    has_come = is_over = False

    def __call__(self, number: int, _: Any) -> None:
        self.has_come = not (self.has_come or self.is_over)
        if not self.has_come:
            raise KeyboardInterrupt


def stopping_together(ranks: Ranks, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
    """The same records; KeyboardInterrupt on all ranks where Ctrl-C came to any of them.

    Where every rank has its own handler, as in `train --distributed`, it is the program that stops them.
    """
    with noted_interrupt() as noted:
        if not ranks.largest(int(noted is not None)):
            yield from records
            return
        for record in records:
            yield record
            if ranks.largest(int(noted is not None and noted.has_come)):
                raise KeyboardInterrupt


@contextmanager
def noted_interrupt() -> Iterator[Noted | None]:
    """Within the block Ctrl-C is noted; where nothing was raised its end raises KeyboardInterrupt.

    A generator that is left, as by `break`, ends the block too, but what it raises Python only prints:
    Ctrl-C then comes again, a moment later. One that is kept without `close` still takes the first Ctrl-C,
    for the next training to stop. None where Python would not raise: a program's own handler stays.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()  # only that thread may set handlers
    if not is_main or not (before is signal.default_int_handler or isinstance(before, Noted)):
        yield None
        return
    noted = Noted()
    if isinstance(before, Noted):  # of a generator that was kept
        noted.has_come, before.has_come = before.has_come, False
    signal.signal(signal.SIGINT, noted)
    try:
        yield noted
    except GeneratorExit:
        if noted.has_come:
            main = threading.main_thread().ident
            # in seconds: when the generators around it have ended too
            threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
        raise
    finally:
        give_back(noted)
    if noted.has_come:
        raise KeyboardInterrupt


def give_back(noted: Noted) -> None:
    noted.is_over = True  # if another thread ends the block, the handler stays, and does as Python's
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is noted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
