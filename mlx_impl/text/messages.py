"""Messages as other programs write them, in the one form that chat templates read.

Sources: TRL leaves null keys out; ShareGPT has `from` and `value`; OpenAI has parts, arguments as JSON text,
and `weight`.
"""

from __future__ import annotations

from sys import intern
from typing import Any

from ..disk.files import one_line
from .conversation import Message
from .reasoning import REASONING, with_reasoning
from .tool_calls import list_of, parsed, read_call

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
    message = {intern(key): value for key, value in raw.items()}  # JSON makes a new key for each row
    if "from" in message and "role" not in message:
        message = from_sharegpt(message)
    for key, advice in REFUSED.items():
        if key in message:
            raise ValueError(f'has "{key}", which cannot be read: {advice}')
    if not isinstance(message.get("role"), str):
        found = one_line(", ".join(map(repr, raw)) or "none")
        raise ValueError(f'must have the texts "role" and "content", or "from" and "value", got {found}')
    if "content" in message:
        message["content"] = joined_text(message["content"])
    if "tool_calls" in message:
        message["tool_calls"] = [read_call(call) for call in list_of("tool_calls", message["tool_calls"])]
    message["role"] = intern(message["role"])
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
            raise ValueError(
                f'must have a text or text parts as "content", got a part of type {one_line(repr(kind))}'
            )
    return "".join(part["text"] for part in content)


def take_trained(message: Message) -> bool:
    """Remove `weight` and `train` from a message: whether it may be a target."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1):
        raise ValueError(f'must have a "weight" of 0 or 1, got {one_line(repr(weight))}')
    if not isinstance(train, bool):
        raise ValueError(f'must have true or false as "train", got {one_line(repr(train))}')
    return bool(weight) and train
