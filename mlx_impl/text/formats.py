"""The known formats of a row: each becomes the one canonical `Conversation`.

Sources: TRL's dataset formats (`text`, `messages`, `prompt` and `completion`), ShareGPT (`conversations`),
Alpaca (`instruction`, `input`, `output`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..disk.files import one_line
from .conversation import Conversation, Message
from .messages import joined_text, read_messages
from .tool_calls import list_of, parsed

Row = dict[str, Any]


class Format(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]  # of this format alone
    shared: tuple[str, ...]  # optional in several formats
    read: Callable[[Row, str], Conversation]  # (row, "file:line")


def from_text(row: Row, where: str) -> Conversation:
    if "answer" in row:
        raise ValueError('"answer" must belong to a reply, but a "text" has no reply')
    return Conversation((), None, where, text=text_of(row, "text"))


def from_messages(row: Row, where: str) -> Conversation:
    return conversation("messages", *read_messages("messages", row["messages"]), row, where)


def from_sharegpt(row: Row, where: str) -> Conversation:
    return conversation("conversations", *read_messages("conversations", row["conversations"]), row, where)


def from_prompt(row: Row, where: str) -> Conversation:
    """Two texts, or two lists of messages of which the second is one reply."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        found = chat(text_of(row, "prompt"), text_of(row, "completion")), set[int]()
        return conversation("prompt", *found, row, where, is_plain=True)
    messages, untrained = read_messages("prompt", prompt)
    (reply, *more), unread = read_messages("completion", completion)
    if more or reply["role"] != "assistant":
        roles = one_line(", ".join(message["role"] for message in (reply, *more)))
        raise ValueError(
            f'"completion" must be one message of role "assistant", got {roles}: use "messages" instead'
        )
    untrained |= {len(messages)} if unread else set()
    return conversation("prompt", [*messages, reply], untrained, row, where, len(messages))


def from_alpaca(row: Row, where: str) -> Conversation:
    """The instruction, and in a line of its own the input if there is one."""
    turns = row.get("history", [])
    if not isinstance(turns, list) or not all(
        isinstance(t, list) and list(map(type, t)) == [str, str] for t in turns
    ):
        raise ValueError('"history" must be a list of pairs of texts')
    texts = text_of(row, "instruction"), text_of(row, "input") if "input" in row else ""
    question = "\n".join(filter(None, texts))
    messages = [message for turn in turns for message in chat(*turn)]
    messages += chat(question, text_of(row, "output"))
    return conversation("instruction", messages, set(), row, where)


def chat(question: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def text_of(row: Row, name: str) -> str:
    if isinstance(row[name], str):
        return str(row[name])
    raise ValueError(f'"{name}" must be a text, got {type(row[name]).__name__}')


def conversation(
    name: str,
    messages: list[Message],
    untrained: set[int],
    row: Row,
    where: str,
    num_prompt: int = 0,
    is_plain: bool = False,
) -> Conversation:
    """The messages, with the row's system prompt, tools and answer."""
    if system := joined_system(row):
        if messages[0]["role"] == "system":
            raise ValueError(f'"system" must not be there where "{name}" begins with a system message')
        messages = [{"role": "system", "content": system}, *messages]
        untrained, num_prompt, is_plain = {i + 1 for i in untrained}, num_prompt and num_prompt + 1, False
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise ValueError(
            f'"{name}" must end with the reply of role "assistant" to an earlier message, '
            f"got {len(messages)} messages that end with role {one_line(repr(role))}"
        )
    tools = tools_of(row)
    is_plain = is_plain and tools is None
    answer = answer_of(row)
    return Conversation(
        tuple(messages), answer, where, tools, None, frozenset(untrained), num_prompt, is_plain
    )


def joined_system(row: Row) -> str:
    try:
        return joined_text(row.get("system", ""))
    except ValueError:
        raise ValueError(f'"system" must be a text, got {type(row["system"]).__name__}') from None


def answer_of(row: Row) -> str | None:
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and not (isinstance(answer, str) and any(map(str.isalnum, answer))):
        raise ValueError(f'"answer" must be a text with a letter or a digit, got {one_line(repr(answer))}')
    return answer


def tools_of(row: Row) -> tuple[dict[str, Any], ...] | None:
    """A list of objects; the list, or each of them, may be a JSON text, as columns of data sets need it."""
    if row.get("tools") in (None, ""):
        return None
    try:
        tools = parsed("tools", row["tools"]) if isinstance(row["tools"], str) else row["tools"]
        tools = [parsed("tools", t) if isinstance(t, str) else t for t in list_of("tools", tools or [])]
    except ValueError:
        tools = [None]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" must be a list of objects, or such a list as JSON text')
    return tuple(tools) or None


SHARED = ("system", "tools", "answer")
FORMATS = (
    Format(("messages",), (), SHARED, from_messages),
    Format(("conversations",), (), SHARED, from_sharegpt),
    Format(("prompt", "completion"), (), SHARED, from_prompt),
    Format(("instruction", "output"), ("input", "history"), SHARED, from_alpaca),
    Format(("text",), (), ("answer",), from_text),
)
