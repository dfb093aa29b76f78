"""Where a person reads: a terminal gets colour and movement, anything else plain lines. No MLX import.

rich heeds NO_COLOR; a terminal that cannot move its cursor (TERM=dumb) counts as none.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.text import Text

LOG_SECONDS = 30.0
Item = TypeVar("Item")


class PipedConsole(Console):
    """A console whose reader may leave: rich would end the program with 1, `__main__` knows better."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(stderr: bool) -> Console:
    """Of standard output or standard error; lines are left as long as they are."""
    return PipedConsole(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def working(text: str, console: Console) -> AbstractContextManager[object]:
    """Within the block a terminal shows that this is going on; anything else shows nothing."""
    return console.status(text)


def counted(items: Iterable[Item], num_items: int, text: str, console: Console) -> Iterable[Item]:
    """The same items, shown as they pass: by a bar on a terminal, else by a line now and then."""
    if console.is_interactive:
        return track(items, text, num_items, console=console, transient=True)
    return logged(items, num_items, text, console)


def logged(items: Iterable[Item], num_items: int, text: str, console: Console) -> Iterator[Item]:
    """The same items; a line every LOG_SECONDS says how many have passed, and how long the rest will take."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= LOG_SECONDS:
            left = (num_items - done) * (now - start) / done
            console.print(f"{text}: {done} of {num_items}, {left:.0f} s left")
            last = now
        yield item


def harmless(text: str) -> str:
    """The text of a model without characters that would move the cursor or recolour the terminal."""
    return "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in text)


def print_error(message: str) -> None:
    make_console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {message}"))
