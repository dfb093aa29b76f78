"""Find where each reply is in a rendered conversation, in characters, for any chat template.

A reply starts where generation would start: at the length of the prompt, which is the earlier messages
rendered with the generation prompt, if the whole text begins with that prompt. For some templates it does
not: they add or strip thinking, trim, or open the turn differently for generation. Then the conversation is
rendered again with another reply, and the reply is the part of the text that changes.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .conversation import Message

Render = Callable[[Sequence[Message], bool], str]  # messages, add_generation_prompt

TARGETS = ("completion", "assistant", "all")  # the last reply, every reply, every token
# Characters that stand for another message. Those of private use come first: no template prints one itself.
MARKERS = "".join(map(chr, range(0xE000, 0xF900))) + string.ascii_letters + string.digits


@dataclass(frozen=True)
class Turn:
    """Where a reply, or another message, is in the rendered text."""

    start: int
    end: int  # of the reply's own text; its end-of-turn token comes at or after it
    next_start: int  # where the next message begins
    is_trained: bool = True  # False: its tokens are no targets


def find_turns(render: Render, whole: str, messages: Sequence[Message], chosen: Sequence[int]) -> list[Turn]:
    """Where the chosen messages are in the rendered text `whole`; ValueError if it does not show one."""
    return [find_turn(render, whole, messages, i) for i in chosen]


def find_turn(render: Render, whole: str, messages: Sequence[Message], i: int) -> Turn:
    start, span = prompt_length(render, whole, messages[:i]), message_span(render, whole, messages, i)
    if span is None:
        kind = "the reply" if messages[i]["role"] == "assistant" else "which is marked as no target"
        raise ValueError(f"the chat template must show message {i + 1}, {kind}, and does not")
    after = message_span(render, whole, messages, i + 1) if i + 1 < len(messages) else None
    next_start = after[0] if after else len(whole)
    end = span[1] if span[1] <= next_start else own_end(render, whole, messages, i, next_start)
    return Turn(span[0] if start is None else start, end, next_start)


def own_end(render: Render, whole: str, messages: Sequence[Message], i: int, next_start: int) -> int:
    """The end of a reply without which the next message is not shown, such as a tool's result in Gemma 4.

    It is where the text of the conversation up to this reply stops to be that of the whole one.
    """
    try:
        return min(next_start, common_prefix_length(whole, render(messages[: i + 1], False)))
    except ValueError:
        return next_start


def prompt_length(render: Render, whole: str, before: Sequence[Message]) -> int | None:
    """The length of the prompt for the next reply; None if `whole` does not begin with that prompt."""
    try:
        prompt = render(before, True)
    except ValueError:  # for example a template that needs a user's message
        return None
    return len(prompt) if whole.startswith(prompt) else None


def message_span(render: Render, whole: str, messages: Sequence[Message], i: int) -> tuple[int, int] | None:
    """Start and end of message i in the rendered text; None if the text does not depend on the message.

    Message i is replaced by one character that is not in the text, so that the two texts differ at both ends
    of the message. ValueError for a template that shows the message more than once: the part that differs
    would include other messages.
    """
    marker = free_marker(whole)
    for kept in ({"role": messages[i]["role"]}, messages[i]):  # without its tool calls, else with them
        try:
            other = render([*messages[:i], {**kept, "content": marker}, *messages[i + 1 :]], False)
        except ValueError:
            continue
        if (times := other.count(marker)) > 1:
            raise ValueError(f"the chat template must show message {i + 1} once, and shows it {times} times")
        if times == 1:
            start = common_prefix_length(whole, other)
            same_after = common_prefix_length(whole[start:][::-1], other[start:][::-1])
            return start, len(whole) - same_after
    return None


def free_marker(text: str) -> str:
    """A character that is not in the text."""
    marker = next((c for c in MARKERS if c not in text), None)
    if marker is None:
        raise ValueError(
            "a conversation must not contain every letter, every digit and all of U+E000-F8FF: "
            "one of them must be free to mark a reply"
        )
    return marker


def common_prefix_length(one: str, other: str) -> int:
    """How many leading characters two texts share, found by bisection."""
    least, most = 0, min(len(one), len(other))  # the first `least` characters are known to be equal
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
