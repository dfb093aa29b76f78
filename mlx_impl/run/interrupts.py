"""Ctrl-C where several ranks train: KeyboardInterrupt on all of them, after the same update.

Raised on one rank alone it would leave the others in a collective, whose next message would be of another
training.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..train import StepRecord
from .ranks import Ranks


def stopping_together(ranks: Ranks, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
    """The same records; KeyboardInterrupt on all ranks where Ctrl-C came to any of them."""
    with noted_interrupt() as is_noted:
        for record in records:
            yield record
            if ranks.largest(int(is_noted())):
                raise KeyboardInterrupt


@contextmanager
def noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block a first Ctrl-C is noted and a second one raises KeyboardInterrupt at once.

    Only where Python would raise it: a program's own handler stays.
    """
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    is_main = threading.current_thread() is threading.main_thread()  # only that thread may set handlers
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
