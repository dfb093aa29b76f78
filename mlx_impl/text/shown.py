"""What a chat template must show of the data: tools, tool calls, the reasoning of a reply that is trained.

A template is free to leave out what it does not know, and then the model would be trained without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .conversation import Message
from .reasoning import REASONING
from .shown_at_once import Changed, are_calls_shown, free_marks, shows_all
from .turns import free_marker

Render = Callable[[Sequence[Message], bool, Sequence[Any] | None], str]

# A reply's reasoning: must be shown; is written into the reply's text first; is left to the template.
CHOICES = ("require", "inline", "template")
END_OF_THOUGHT = "</think>"
INLINE = "--reasoning inline writes it into the reply"
LEAVE = "--reasoning template trains only what the template shows"


def require_tools_shown(
    render: Render, whole: str, messages: Sequence[Message], tools: Sequence[Any] | None
) -> None:
    """ValueError if the text is the same without the tools, or without the tool calls of a message."""
    without: dict[str, tuple[Sequence[Message], Sequence[Any] | None]] = {}
    if tools:
        without['"tools"'] = messages, None
    callers = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    for i in [] if are_calls_shown(render, whole, messages, tools, callers) else callers:
        no_calls = {key: value for key, value in messages[i].items() if key != "tool_calls"}
        others = [*messages[:i], no_calls, *messages[i + 1 :]]
        without[f'the "tool_calls" of message {i + 1}'] = others, tools
    for name, (other_messages, other_tools) in without.items():
        try:
            other = render(other_messages, False, other_tools)
        except ValueError:  # for example a template that needs a call before a tool's result
            continue
        if other == whole:
            raise ValueError(f"the chat template must show {name}, and does not")


def is_all_reasoning_shown(
    render: Render,
    whole: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    numbers: Sequence[int],
) -> bool:
    """Whether two renderings show the reasoning of all these messages: in fields, and in the texts."""
    marks = dict(zip(numbers, free_marks(whole), strict=False))
    if len(marks) < len(numbers) or len(numbers) < 2:
        return False
    variants: list[Changed] = [{}, {}]
    for i, mark in marks.items():
        for changed, (_, other, _) in zip(variants, with_reasoning_replaced(messages[i], mark), strict=False):
            changed[i] = mark, other
    return all(shows_all(render, messages, tools, changed) for changed in variants if changed)


def has_reasoning(message: Message) -> bool:
    return any(True for _ in with_reasoning_replaced(message, ""))


def require_reasoning_shown(
    render: Render,
    whole: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    numbers: Sequence[int],
) -> None:
    """ValueError if the text does not depend on the reasoning of one of the messages with these numbers."""
    for i in [] if is_all_reasoning_shown(render, whole, messages, tools, numbers) else numbers:
        marker = free_marker(whole)
        for name, other, advice in with_reasoning_replaced(messages[i], marker):
            try:
                text = render([*messages[:i], other, *messages[i + 1 :]], False, tools)
            except ValueError:  # for example a template that reads a part of the reasoning
                continue
            if marker not in text:
                raise ValueError(
                    f"the chat template must show {name} of message {i + 1}, and does not: {advice}"
                )


def with_reasoning_replaced(message: Message, marker: str) -> Iterator[tuple[str, Message, str]]:
    """The name of each reasoning, the message with the marker in its place, and what would do.

    Reasoning is in fields of its own, or before </think> in the text.
    """
    fields = [key for key in REASONING if message.get(key)]
    if fields:
        yield f'the "{fields[0]}"', {**message, **dict.fromkeys(fields, marker)}, f"{INLINE}, {LEAVE}"
    content = message.get("content")
    before, end, after = content.rpartition(END_OF_THOUGHT) if isinstance(content, str) else ("", "", "")
    outside, start, thought = before.rpartition("<think>")
    if end and thought.strip():
        yield "the <think> text", {**message, "content": f"{outside}{start}{marker}{end}{after}"}, LEAVE
