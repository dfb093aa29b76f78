"""Where a reply stands in a rendered conversation, for any chat template, in characters; and what it hides.

A reply begins where the model is asked to go on: after the rendering of what comes before it with the
generation prompt, where that is how the whole begins. It is not for a template that adds or strips thinking,
trims, or opens a turn otherwise when it asks; there the conversation is rendered again with another reply,
and what differs is the reply.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .rows import Message

Render = Callable[[Sequence[Message], bool], str]  # messages, add_generation_prompt
RenderTools = Callable[[Sequence[Message], bool, Sequence[Any] | None], str]

TARGETS = ("completion", "assistant", "all")  # the last reply, every reply, every token
# Private use first: a template has no such character of its own, which would count as a second reply.
PROBES = "".join(map(chr, range(0xE000, 0xF900))) + string.ascii_letters + string.digits


@dataclass(frozen=True)
class Turn:
    """A reply in the rendered text."""

    start: int
    end: int  # of what was said; the end-of-turn token comes at or after it
    limit: int  # where the next message begins


def find_turns(render: Render, whole: str, messages: Sequence[Message], every: bool) -> list[Turn]:
    """The last reply, or every one; `whole` is the rendering. ValueError for one that does not show in it."""
    last = len(messages) - 1
    chosen = [i for i, m in enumerate(messages) if i == last or (every and m["role"] == "assistant")]
    return [find_turn(render, whole, messages, i) for i in chosen]


def find_turn(render: Render, whole: str, messages: Sequence[Message], i: int) -> Turn:
    start, said = prompt_length(render, whole, messages[:i]), changing_part(render, whole, messages, i)
    if said is None:
        raise ValueError(f"the chat template must show message {i + 1}, the reply, and does not")
    after = changing_part(render, whole, messages, i + 1) if i + 1 < len(messages) else None
    limit = after[0] if after else len(whole)
    return Turn(said[0] if start is None else start, said[1], limit)


def prompt_length(render: Render, whole: str, before: Sequence[Message]) -> int | None:
    """The number of characters after which the model is to reply, where `whole` begins with them."""
    try:
        prompt = render(before, True)
    except ValueError:  # such as a template that needs a message of the user
        return None
    return len(prompt) if whole.startswith(prompt) else None


def changing_part(render: Render, whole: str, messages: Sequence[Message], i: int) -> tuple[int, int] | None:
    """Start and end of what message i is in the rendering; None where nothing depends on it.

    The other message is one character that stands nowhere, so that it differs at both ends. ValueError for a
    template that repeats it: between the two may stand what others said.
    """
    probe = next((c for c in PROBES if c not in whole), None)
    if probe is None:
        raise ValueError("a conversation must leave out one of U+E000-F8FF, a letter or a digit, and has all")
    for kept in ({"role": messages[i]["role"]}, messages[i]):  # without the tool calls, or with them
        try:
            other = render([*messages[:i], {**kept, "content": probe}, *messages[i + 1 :]], False)
        except ValueError:
            continue
        if (times := other.count(probe)) > 1:
            raise ValueError(f"the chat template must show message {i + 1} once, and shows it {times} times")
        if times == 1:
            start = same_before(whole, other)
            same_after = same_before(whole[start:][::-1], other[start:][::-1])
            return start, len(whole) - same_after
    return None


def same_before(one: str, other: str) -> int:
    """How many characters both texts begin with, by bisection: the first `least` are the same in both."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def require_tools_shown(
    render: RenderTools, whole: str, messages: Sequence[Message], tools: Sequence[Any] | None
) -> None:
    """ValueError where the text is the same without the tools, or without the calls of a message."""
    without: dict[str, tuple[Sequence[Message], Sequence[Any] | None]] = {}
    if tools:
        without['"tools"'] = messages, None
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            silent = {key: value for key, value in message.items() if key != "tool_calls"}
            others = [*messages[:i], silent, *messages[i + 1 :]]
            without[f'the "tool_calls" of message {i + 1}'] = others, tools
    for name, (said, described) in without.items():
        try:
            other = render(said, False, described)
        except ValueError:  # such as a template that needs a call before what a tool says
            continue
        if other == whole:
            raise ValueError(f"the chat template must show {name}, and does not")
