"""Where a person reads: a terminal gets colour and movement, anything else plain lines. No MLX import.

rich heeds NO_COLOR; a terminal that cannot move its cursor (TERM=dumb) counts as none.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.text import Text

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
    """The same items, on a terminal with a bar that goes when they have passed."""
    is_shown = console.is_interactive
    return track(items, text, num_items, console=console, transient=True, disable=not is_shown)


def harmless(text: str) -> str:
    """The text of a model without characters that would move the cursor or recolour the terminal."""
    return "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in text)


def print_error(message: str) -> None:
    make_console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {message}"))
