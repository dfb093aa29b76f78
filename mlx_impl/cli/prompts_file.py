"""`generate --prompts FILE`: several prompts from a text file or from JSON Lines. No MLX import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..disk.files import one_line, read_text
from ..text.conversation import is_text
from ..text.messages import read_message

JSON_LINES = (".jsonl", ".ndjson")
Prompt = str | list[dict[str, Any]]  # a text, or messages


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts: a line each; of JSON Lines a text, {"prompt": ...} or {"messages": [...]} a line.

    Raises ValueError, with file and line, for anything else, and for a file without a prompt.
    """
    lines = enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1)
    found = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path}: must hold at least one prompt, got none")
    if path.suffix.lower() not in JSON_LINES:
        return [line.rstrip("\r") for _, line in found]
    return [parse_prompt(where, line) for where, line in found]


def parse_prompt(where: str, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be JSON: {one_line(error)}") from None
    if isinstance(value, dict):
        value = next((v for key in ("messages", "prompt") if (v := value.get(key)) is not None), None)
    if isinstance(value, list) and value:
        return without_last_reply(read_messages(where, value))
    if not is_text(value):
        raise ValueError(f'{where}: must be a text, or have "prompt" or "messages", got {one_line(line)}')
    return str(value)


def read_messages(where: str, raw: list[Any]) -> list[dict[str, Any]]:
    messages = []
    for number, message in enumerate(raw, 1):
        try:
            messages.append(read_message(message))
        except ValueError as error:
            raise ValueError(f"{where}: message {number} {error}") from None
    return messages


def without_last_reply(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of training data ends with the reply that the model is asked for."""
    is_answered = len(messages) > 1 and messages[-1].get("role") == "assistant"
    return messages[:-1] if is_answered else messages
