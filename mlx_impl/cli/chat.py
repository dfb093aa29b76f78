"""`generate --chat`: a conversation at the terminal, with its history."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from .signals import StoppedBySignal

Message = dict[str, Any]
WELCOME = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer"
RESET, QUIT, HELP = "/reset", ("/quit", "/exit"), "/help"
PROMPT = "> "


def chat(system: str | None, reply_to: Callable[[list[Message]], str], console: Console) -> None:
    """Read messages and let `reply_to` print the answers, until the user leaves.

    `reply_to(messages)` returns the text that it has printed, also where Ctrl-C has ended it early.
    """
    console.print(WELCOME)
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    history = list(start)
    for line in lines(console):
        if line == RESET:
            history = list(start)
            console.print("the conversation begins again")
        elif line == HELP or (line.startswith("/") and " " not in line):
            console.print(WELCOME if line == HELP else f"no such command: {line}; {WELCOME}")
        else:
            history = answered([*history, {"role": "user", "content": line}], history, reply_to, console)


def answered(
    messages: list[Message],
    before: list[Message],
    reply_to: Callable[[list[Message]], str],
    console: Console,
) -> list[Message]:
    """The history with the answer; that from before where the message cannot be answered."""
    try:
        return [*messages, {"role": "assistant", "content": reply_to(messages)}]
    except ValueError as error:
        console.print(f"error: {error}; {RESET} begins again")
        return before


def lines(console: Console) -> Iterator[str]:
    """What the user types, without empty lines, up to /quit or the end of the input."""
    if sys.stdin is None:
        return
    if sys.stdin.isatty():
        import readline  # noqa: F401 - arrow keys in input()
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "").strip()
        except EOFError:
            console.print()
            return
        except UnicodeDecodeError:
            console.print("error: a message must be UTF-8 text")
            continue
        if line in QUIT:
            return
        if line:
            yield line


def is_ctrl_c(stop: StoppedBySignal) -> bool:
    return stop.exit_code == 128 + signal.SIGINT
