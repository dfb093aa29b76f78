"""Output for people: colours and progress bars on a terminal, plain lines elsewhere. No MLX import.

rich obeys NO_COLOR, and treats a terminal that cannot move its cursor (TERM=dumb) as none.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import track
from rich.status import Status
from rich.text import Text

from ...machine.launcher import launched_rank
from ..signals import stop_without_reader

LOG_SECONDS = 30.0
REFRESH_SECONDS = 0.1  # of a text beside a spinner
Item = TypeVar("Item")


class Watch(Protocol):
    """`show_progress` on a console that is given already."""

    def __call__(self, items: Iterable[Item], num_items: int, text: str) -> Iterable[Item]: ...


class PipedConsole(Console):
    """Raises BrokenPipeError, which `__main__` handles, where rich would exit with code 1.

    A rank asks all ranks to stop instead: they could not save without it.
    """

    def on_broken_pipe(self) -> None:
        if launched_rank() is None:
            raise BrokenPipeError
        stop_without_reader()


def make_console(stderr: bool, quiet: bool = False) -> Console:
    """A console on standard output or standard error. It breaks no lines, so that paths can be copied."""
    return PipedConsole(stderr=stderr, quiet=quiet, highlight=False, markup=False, soft_wrap=True)


def show_status(text: str, console: Console) -> Status:
    """Within the block a terminal shows the text with a spinner; anything else shows nothing.

    `update` of the result replaces the text.
    """
    return console.status(text)


class StatusLine:
    """Tells what is being done, beside the spinner of `show_status`."""

    def __init__(self, status: Status, console: Console) -> None:
        self.status, self.console = status, console

    def __call__(self, text: str) -> None:
        self.status.update(text)

    def count(self, text: str) -> Callable[[Sequence[Item]], Iterable[Item]]:
        """The same items; a terminal shows how many are done, anything else a line every LOG_SECONDS."""

        def counted(items: Sequence[Item]) -> Iterator[Item]:
            if not self.console.is_interactive:
                yield from log_progress(items, len(items), text, self.console)
                return
            start = last = time.monotonic()
            for done, item in enumerate(items):
                now = time.monotonic()
                if now - last >= REFRESH_SECONDS:
                    self.status.update(how_far(text, done, len(items), now - start))
                    last = now
                yield item

        return counted


def how_far(text: str, done: int, num_items: int, seconds: float) -> str:
    """How many are done, and how long the rest will take."""
    return f"{text}: {done:,} of {num_items:,}, {(num_items - done) * seconds / max(done, 1):.0f} s left"


def watch_on(console: Console) -> Watch:
    return partial(show_progress, console=console)


def show_progress(items: Iterable[Item], num_items: int, text: str, console: Console) -> Iterable[Item]:
    """The same items; a terminal shows a progress bar, anything else a line every LOG_SECONDS."""
    if console.is_interactive:
        return track(items, text, num_items, console=console, transient=True)
    return log_progress(items, num_items, text, console)


def progress_of(text: str, console: Console) -> Callable[[Sequence[Item]], Iterable[Item]]:
    """`show_progress` of any sequence."""
    return lambda items: show_progress(items, len(items), text, console)


def log_progress(items: Iterable[Item], num_items: int, text: str, console: Console) -> Iterator[Item]:
    """The same items; every LOG_SECONDS a line says how many are done and how long the rest will take."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= LOG_SECONDS:
            console.print(how_far(text, done, num_items, now - start))
            last = now
        yield item


def printable(text: str) -> str:
    """The text with U+FFFD for control characters, which could move the cursor or clear the terminal."""
    return "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in text)


def print_error(message: str) -> None:
    make_console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {message}"))
