"""The reasoning of a reply, in fields of its own or in its text.

Source: transformers 5.23 gives a template a reply's reasoning under `reasoning_content` and `thinking`.
"""

from __future__ import annotations

from dataclasses import replace

from .conversation import Conversation, Message

REASONING = ("reasoning_content", "thinking", "reasoning")  # in transformers' order


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
