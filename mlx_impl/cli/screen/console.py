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

LOG_SECONDS = 30.0
Item = TypeVar("Item")


class Watch(Protocol):
    """`show_progress` on a console that is given already."""

    def __call__(self, items: Iterable[Item], num_items: int, text: str) -> Iterable[Item]: ...


class PipedConsole(Console):
    """Raises BrokenPipeError, which `__main__` handles, where rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(stderr: bool, quiet: bool = False) -> Console:
    """A console on standard output or standard error. It breaks no lines, so that paths can be copied."""
    return PipedConsole(stderr=stderr, quiet=quiet, highlight=False, markup=False, soft_wrap=True)


def show_status(text: str, console: Console) -> Status:
    """Within the block a terminal shows the text with a spinner; anything else shows nothing.

    `update` of the result replaces the text.
    """
    return console.status(text)


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
            left = (num_items - done) * (now - start) / done
            console.print(f"{text}: {done} of {num_items}, {left:.0f} s left")
            last = now
        yield item


def printable(text: str) -> str:
    """The text with U+FFFD for control characters, which could move the cursor or clear the terminal."""
    return "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in text)


def print_error(message: str) -> None:
    make_console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {message}"))
