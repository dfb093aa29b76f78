"""Whether a template shows something of many messages, by one rendering with a mark in each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .conversation import Message
from .turns import MARKERS

Render = Callable[[Sequence[Message], bool, Sequence[Any] | None], str]
Changed = dict[int, tuple[str, Message]]  # by the message's number: a mark, and the message with it


def free_marks(text: str) -> Iterator[str]:
    """Characters that are not in the text."""
    used = set(text)
    return (mark for mark in MARKERS if mark not in used)


def shows_all(
    render: Render,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    changed: Mapping[int, tuple[str, Message]],
) -> bool:
    """Whether a rendering with the changed messages shows the mark of each of them."""
    others = [changed[i][1] if i in changed else message for i, message in enumerate(messages)]
    try:
        text = render(others, False, tools)
    except ValueError:
        return False
    return all(mark in text for mark, _ in changed.values())


def are_calls_shown(
    render: Render,
    whole: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    callers: Sequence[int],
) -> bool:
    """Whether one rendering shows a call of each of these messages, under another name for each."""
    marks = zip(callers, free_marks(whole), strict=False)
    changed = {i: (mark, with_first_call_named(messages[i], mark)) for i, mark in marks}
    return len(callers) > 1 and len(changed) == len(callers) and shows_all(render, messages, tools, changed)


def with_first_call_named(message: Message, name: str) -> Message:
    """The message with this name for the function of its first call."""
    first, *others = message["tool_calls"]
    if not isinstance(first, dict):
        return message
    if isinstance(first.get("function"), dict):
        renamed = {**first, "function": {**first["function"], "name": name}}
    else:
        renamed = {**first, "name": name}
    return {**message, "tool_calls": [renamed, *others]}
