"""Tool calls: a template gets their arguments as an object, which it encodes, and not as a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..disk.files import one_line
from .conversation import Message


def read_call(call: Any) -> dict[str, Any]:
    """A tool call whose arguments are an object: templates encode them, and would encode a text twice."""
    if not isinstance(call, dict):
        raise ValueError(f'must have a list of objects as "tool_calls", got one with {type(call).__name__}')
    if isinstance(call.get("function"), dict):
        return {**call, "function": read_call(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return dict(call)
    arguments = parsed("arguments", call["arguments"].strip() or "{}")
    if not isinstance(arguments, dict):
        raise ValueError(f'must have an object as "arguments", got {one_line(repr(call["arguments"]))}')
    return {**call, "arguments": arguments}


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The same with the arguments of tool calls as JSON texts, for templates that do not encode them."""

    def as_text(call: Any) -> Any:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            return {**call, "function": as_text(call["function"])}
        if isinstance(call, dict) and isinstance(call.get("arguments"), dict):
            return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        return call

    return [
        {**m, "tool_calls": [as_text(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m
        for m in messages
    ]


def with_empty_content(messages: Sequence[Message]) -> list[Message]:
    """The same with a text as content also beside tool calls, for templates that fail without one."""
    return [m if "content" in m else {**m, "content": ""} for m in messages]


def parsed(name: str, text: Any) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f'must have JSON as "{name}", got {str(text)[:100]!r}') from None


def list_of(name: str, value: Any) -> list[Any]:
    """A list, or the list in a JSON text."""
    value = parsed(name, value) if isinstance(value, str) and value.strip() else value
    if isinstance(value, list):
        return value
    raise ValueError(f'must have a list of objects as "{name}", got {type(value).__name__}')
