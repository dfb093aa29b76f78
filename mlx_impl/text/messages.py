"""Messages as other programs write them, in the one form that chat templates read.

Sources: transformers 5.23 gives a template a reply's reasoning under `reasoning_content` and `thinking`; TRL
leaves null keys out; ShareGPT has `from` and `value`; OpenAI has parts, arguments as JSON text, and `weight`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .conversation import Conversation, Message

REASONING = ("reasoning_content", "thinking", "reasoning")  # in transformers' order
KNOWN_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING)
ROLES = {  # of ShareGPT; other names stay as they are
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"},
    **{
        "model": "assistant",
        "function_call": "assistant",
        "observation": "tool",
        "function_response": "tool",
    },
}
TEXT_PARTS = ("text", "input_text", "output_text")
REFUSED = {
    "function_call": 'write "tool_calls" instead',
    **dict.fromkeys(("loss", "mask", "trainable"), 'write "weight": 0 where a message is no target'),
    "train_detail": "parts of a message cannot be targets",
    "training_detail": "parts of a message cannot be targets",
}


def without_nulls(value: Any) -> Any:
    """The same without keys whose value is null, at any depth: parquet fills in what a row does not have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_messages(name: str, value: Any) -> tuple[list[Message], set[int]]:
    """The messages of the column `name`, and the numbers (from 0) of those that are no targets."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = without_nulls(parsed(name, value))
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f'"{name}" must be a list of messages, got {got}')
    messages, untrained = [], set()
    for i, raw in enumerate(value):
        try:
            message = read_message(raw)
            if not take_trained(message):
                untrained.add(i)
        except ValueError as error:
            raise ValueError(f'message {i + 1} of "{name}" {error}') from None
        messages.append(message)
    return messages, untrained


def read_message(raw: Any) -> Message:
    """One message; ValueError, as the rest of a sentence, for what cannot be read."""
    if not isinstance(raw, dict):
        raise ValueError(f"must be an object, got {type(raw).__name__}")
    message = dict(raw)
    if "from" in message and "role" not in message:
        message = from_sharegpt(message)
    for key, advice in REFUSED.items():
        if key in message:
            raise ValueError(f'has "{key}", which cannot be read: {advice}')
    if not isinstance(message.get("role"), str):
        found = ", ".join(map(repr, raw)) or "none"
        raise ValueError(f'must have the texts "role" and "content", or "from" and "value", got {found}')
    if "content" in message:
        message["content"] = joined_text(message["content"])
    if "tool_calls" in message:
        message["tool_calls"] = [read_call(call) for call in list_of("tool_calls", message["tool_calls"])]
    is_reply = message["role"] == "assistant"
    if "content" not in message and not (is_reply and message.get("tool_calls")):
        raise ValueError('must have a text as "content", and has none')
    return with_reasoning(message) if is_reply else message


def from_sharegpt(raw: Message) -> Message:
    """{"from", "value"} as {"role", "content"}; a function's call becomes a tool call."""
    sender = raw["from"]
    message = {"role": ROLES.get(sender.lower(), sender.lower()) if isinstance(sender, str) else sender}
    message |= {key: value for key, value in raw.items() if key not in ("from", "value")}
    if sender == "function_call":
        calls = parsed("value", raw.get("value"))
        calls = calls if isinstance(calls, list) else [calls]
        return {**message, "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return message if "value" not in raw else {**message, "content": raw["value"]}


def joined_text(content: Any) -> str:
    """A text, or the texts of a list of parts one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f'must have a text as "content", got {type(content).__name__}')
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f'must have a text or text parts as "content", got a part of type {kind!r}')
    return "".join(part["text"] for part in content)


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
        raise ValueError(f'must have an object as "arguments", got the JSON text {call["arguments"]!r}')
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


def with_reasoning(message: Message) -> Message:
    """The reasoning under every name that a template may read, as transformers does it."""
    if message.keys().isdisjoint(REASONING):
        return message
    found = {key: message[key] for key in REASONING if message.get(key, "") != ""}
    for key, text in found.items():
        if not isinstance(text, str):
            raise ValueError(f'must have a text as "{key}", got {type(text).__name__}')
    if len({*found.values()}) > 1:
        raise ValueError(f"must have one reasoning, got different ones as {' and '.join(map(repr, found))}")
    kept = {key: value for key, value in message.items() if key not in REASONING}
    for text in list(found.values())[:1]:
        return {**kept, **found, "reasoning_content": text, "thinking": text}
    return kept


def with_inline_reasoning(found: Conversation) -> Conversation:
    """Each reply's reasoning in its text, between <think> and </think>, where any template shows it."""
    messages = []
    for message in found.messages:
        if text := message.get("reasoning_content"):
            message = {key: value for key, value in message.items() if key not in REASONING}
            message["content"] = f"<think>\n{text}\n</think>\n\n{message.get('content', '')}"
        messages.append(message)
    return replace(found, messages=tuple(messages))


def take_trained(message: Message) -> bool:
    """Remove `weight` and `train` from a message: whether it may be a target."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1):
        raise ValueError(f'must have a "weight" of 0 or 1, got {weight!r}')
    if not isinstance(train, bool):
        raise ValueError(f'must have true or false as "train", got {train!r}')
    return bool(weight) and train
