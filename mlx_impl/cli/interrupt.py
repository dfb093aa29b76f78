"""Ctrl-C as a request: what is under way is finished and saved first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed."""

    requested = False


@contextmanager
def interrupt_requested() -> Iterator[Interrupt]:
    """Within the block Ctrl-C only marks the request; the block looks at it where it can stop.

    The block's end raises KeyboardInterrupt if there was one, and so does a second Ctrl-C, at once.
    """
    interrupt = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupt.requested:
        raise KeyboardInterrupt
