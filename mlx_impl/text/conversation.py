"""The one form that every row of a data file is turned into. Imports the standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # {"role": ..., "content": ...}, and "tool_calls" and other keys that templates read


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a data file: messages for the chat template, or a plain text."""

    messages: tuple[Message, ...]
    answer: str | None  # words that a right reply must contain, if the row names some
    where: str  # "file:line", for error messages
    tools: tuple[dict[str, Any], ...] | None = None  # tool definitions, for the template
    text: str | None = None  # instead of messages
    untrained: frozenset[int] = frozenset()  # messages (from 0) that the row marks as no targets
    num_prompt: int = 0  # messages of the prompt, whose replies are targets only where every token is
    is_plain: bool = False  # two texts, prompt and completion: a model without a template reads them joined

    @property
    def question(self) -> str:
        """The message before the last reply."""
        return self.messages[-2].get("content") or ""


def is_text(value: object) -> bool:
    """Whether it is a string of valid Unicode: tokenizers cannot encode half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
