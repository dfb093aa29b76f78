"""Read a data file (JSON Lines) into conversations and texts. Imports the standard library only.

Each line has one of mlx-lm's four shapes: {"text"}; {"prompt", "completion"}, a user's message and the reply
to it; {"messages"}; {"messages", "tools"}. One file may mix them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk.files import require_file

Message = dict[str, Any]  # {"role": ..., "content": ...}, and "tool_calls" and other keys that templates read

MAX_LINE_BYTES = 2**23  # more than a million tokens
SHAPES = (("text",), ("prompt", "completion"), ("messages",))


@dataclass(frozen=True)
class Conversation:
    """One line of a data file: messages for the chat template, or a plain text."""

    messages: tuple[Message, ...]
    answer: str | None  # words that a right reply must contain, if the line names some
    where: str  # "file:line", for error messages
    tools: tuple[dict[str, Any], ...] | None = None  # tool definitions, for the template
    text: str | None = None  # instead of messages

    @property
    def question(self) -> str:
        """The message before the last reply."""
        return self.messages[-2].get("content") or ""


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a JSON Lines file; ValueError names the file and the line that is wrong."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such data file")
    require_file(path)
    conversations = [parse_conversation(line, where) for where, line in located_lines(path)]
    if not conversations:
        raise ValueError(f"{path}: must hold at least one example, got an empty file")
    return conversations


def located_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of every line that is not blank; a line that is too long is not read to its end."""
    with open(path, "rb") as file:  # bytes: only "\n" ends a line, and a lone "\r" does not
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(f"{where}: a line must have at most {MAX_LINE_BYTES} bytes, got more")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: must be UTF-8 text: {error.reason}") from None
            if line.strip():
                yield where, line


def parse_conversation(line: str, where: str) -> Conversation:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be valid JSON: {error}") from None
    try:
        if "\\u" in line and not is_text(json.dumps(row, ensure_ascii=False)):  # JSON can escape half a pair
            raise ValueError("texts must be valid Unicode, got half a surrogate pair")
        return to_conversation(row, where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def to_conversation(row: Any, where: str) -> Conversation:
    """The conversation in a row; ValueError, without the place, if it has none of the four shapes."""
    found = [shape for shape in SHAPES if isinstance(row, dict) and all(key in row for key in shape)]
    if len(found) != 1:
        raise ValueError('a line must be an object with one of "messages", "prompt" and "completion", "text"')
    (shape,) = found
    answer = row.get("answer")
    if answer is not None and not (isinstance(answer, str) and any(map(str.isalnum, answer))):
        raise ValueError(f'"answer" must be a text with a letter or a digit, got {answer!r}')
    if shape != ("messages",):
        for key in shape:
            if not isinstance(row[key], str):
                raise ValueError(f'"{key}" must be a text, got {type(row[key]).__name__}')
    if shape == ("text",):
        if answer is not None:
            raise ValueError('"answer" must belong to a reply, but a "text" has no reply')
        return Conversation((), None, where, text=row["text"])
    if shape == ("prompt", "completion"):
        contents = {"user": row["prompt"], "assistant": row["completion"]}
        messages = [{"role": role, "content": content} for role, content in contents.items()]
    else:
        messages = row["messages"]
        require_messages(messages)
    return Conversation(tuple(messages), answer, where, tools_of(row))


def require_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not all(is_message(message) for message in messages):
        raise ValueError('"messages" must be a list of objects with the texts "role" and "content"')
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError('"messages" must end with the reply of role "assistant" to an earlier message')


def is_message(value: object) -> bool:
    """Whether role and content are texts. Beside tool calls of an assistant the content may be missing."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    calls = value.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
        return False
    has_only_calls = value["role"] == "assistant" and bool(calls) and value.get("content") is None
    return has_only_calls or isinstance(value.get("content"), str)


def tools_of(row: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" must be a list of objects')
    return tuple(tools) or None


def is_text(value: object) -> bool:
    """Whether it is a string of valid Unicode: tokenizers cannot encode half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
