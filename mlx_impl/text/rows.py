"""Lines of a data file -> conversations or texts. Standard library only, as is `files`.

Four shapes, told apart line by line, as mlx-lm has them: {"text"}; {"prompt", "completion"}, which is a
question of role user and the reply to it; {"messages"}; {"messages", "tools"}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk.files import require_file

Message = dict[str, Any]  # {"role": ..., "content": ...}, and "tool_calls" or what else a template knows

MAX_LINE_BYTES = 2**23  # more than a million tokens
SHAPES = (("text",), ("prompt", "completion"), ("messages",))


@dataclass(frozen=True)
class Conversation:
    """One line of a data file: messages for the chat template, or a text that is trained as it stands."""

    messages: tuple[Message, ...]
    answer: str | None  # what a right reply must contain, where the file says so
    where: str  # "file:line", for error messages
    tools: tuple[dict[str, Any], ...] | None = None  # descriptions, for the template
    text: str | None = None  # instead of messages

    @property
    def question(self) -> str:
        """What was said before the last reply."""
        return self.messages[-2].get("content") or ""


def read_conversations(path: Path) -> list[Conversation]:
    """A JSON Lines file, one of the four shapes a line; ValueError names the file and the line."""
    if not path.exists():
        raise ValueError(f"{path}: a data file must be a file, and there is none of this name")
    require_file(path)
    conversations = [parse_conversation(line, where) for where, line in lines_of(path)]
    if not conversations:
        raise ValueError(f"{path}: needs at least one example, got an empty file")
    return conversations


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of every line that is not blank; one too long is never read to its end."""
    with open(path, "rb") as file:  # U+2028 ends no line, and "\\r" is blank to JSON
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(f"{where}: a line must have at most {MAX_LINE_BYTES} bytes, and has more")
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
        raise ValueError(f"{where}: not a line of JSON: {error}") from None
    try:
        if "\\u" in line and not is_text(json.dumps(row, ensure_ascii=False)):  # JSON can spell half a pair
            raise ValueError("texts must be Unicode, and one has half a surrogate pair")
        return conversation_of(row, where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def conversation_of(row: Any, where: str) -> Conversation:
    """ValueError, which does not say where, for a row of none of the shapes."""
    found = [shape for shape in SHAPES if isinstance(row, dict) and all(key in row for key in shape)]
    if len(found) != 1:
        raise ValueError('a line must be an object with "messages", "prompt" and "completion", or "text"')
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
            raise ValueError('"answer" must belong to a reply, and a "text" has none')
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
    """Role and content are texts; an assistant that calls tools may say nothing beside."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    calls = value.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
        return False
    is_silent = value["role"] == "assistant" and bool(calls) and value.get("content") is None
    return is_silent or isinstance(value.get("content"), str)


def tools_of(row: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" must be a list of objects')
    return tuple(tools) or None


def is_text(value: object) -> bool:
    """A string that is Unicode, without half a surrogate pair, which no tokenizer reads."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
