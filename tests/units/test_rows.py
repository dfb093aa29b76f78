"""Data files: the four shapes of a line, and an error that names each bad line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.text.rows import MAX_LINE_BYTES, Conversation, is_text, read_conversations
from tests.tiny_folder import conversation_line

USER = {"role": "user", "content": "Hi?"}
REPLY = {"role": "assistant", "content": "Yes."}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
CALLS = [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def read(folder: Path, *rows: dict[str, Any]) -> list[Conversation]:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_conversations(path)


def test_a_prompt_and_its_completion_become_two_messages(tmp_path: Path) -> None:
    (conversation,) = read(tmp_path, {"prompt": "Hi?", "completion": "Yes.", "answer": "yes"})
    assert conversation.messages == (USER, REPLY)
    assert (conversation.answer, conversation.question) == ("yes", "Hi?")


def test_a_text_has_no_messages(tmp_path: Path) -> None:
    (conversation,) = read(tmp_path, {"text": "Once.", "source": "a book"})
    assert (conversation.text, conversation.messages) == ("Once.", ())


def test_tools_and_calls_without_content_are_kept_as_they_are(tmp_path: Path) -> None:
    """Some templates treat null content and absent content differently."""
    system = {"role": "system", "content": "Be brief."}
    null = {"role": "assistant", "content": None, "tool_calls": CALLS}
    absent = {"role": "assistant", "tool_calls": CALLS}
    result = {"role": "tool", "content": "noon", "name": "now"}
    messages = [system, USER, null, result, absent, result, REPLY]
    (conversation,) = read(tmp_path, {"messages": messages, "tools": [TOOL]})
    assert list(conversation.messages) == messages
    assert conversation.tools == (TOOL,)


def test_each_line_may_have_a_shape_of_its_own(tmp_path: Path) -> None:
    rows = read(tmp_path, {"text": "a"}, {"messages": [USER, REPLY], "tools": None}, {"text": "b"})
    assert [row.text for row in rows] == ["a", None, "b"]
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be valid JSON"),
        ("[1]", 'must be an object with one of "messages", "prompt" and "completion", "text"'),
        ('{"prompt": "a"}', 'must be an object with one of "messages", "prompt" and "completion", "text"'),
        ('{"text": "a", "messages": []}', "must be an object with"),
        ('{"text": 3}', '"text" must be a text, got int'),
        ('{"prompt": "a", "completion": null}', '"completion" must be a text, got NoneType'),
        ('{"text": "a", "answer": "a"}', '"answer" must belong to a reply'),
        ('{"messages": "a"}', "must be a list of objects"),
        ('{"messages": [{"role": "user"}]}', 'the texts "role" and "content"'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must end with the reply"),
        (json.dumps({"messages": [USER, {"role": "assistant", "content": None}]}), "must be a list of obj"),
        (json.dumps({"messages": [USER, {**REPLY, "tool_calls": "now"}]}), "must be a list of objects"),
        (json.dumps({"messages": [USER, REPLY], "tools": ["now"]}), '"tools" must be a list of objects'),
        (conversation_line("a", "b", answer=3), '"answer" must be a text with a letter or a digit, got 3'),
        (conversation_line("a", "b", answer="!"), "got '!'"),
        (conversation_line("a", "\ud800"), "texts must be valid Unicode, got half a surrogate pair"),
        ('{"messages": ' + "1" * 5000 + "}", "must be valid JSON"),
        ("[" * 100_000, "must be valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(conversation_line("a", "b") + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_a_line_of_100_megabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with open(path, "wb") as file:
        file.write(conversation_line("a", "b").encode() + b'\n{"text": "')
        file.truncate(100_000_000)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: a line must have at most {MAX_LINE_BYTES} bytes"):
        read_conversations(path)
    assert time.perf_counter() - start < 1


def test_an_empty_or_missing_or_binary_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with pytest.raises(ValueError, match=r"train\.jsonl: there is no such data file"):
        read_conversations(path)
    path.write_text("\n  \n")
    with pytest.raises(ValueError, match="must hold at least one example, got an empty file"):
        read_conversations(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_conversations(path)


def test_a_unicode_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    """JSON allows U+2028 in a string; only a newline ends a line of JSON Lines."""
    path = tmp_path / "train.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b"}\r\n', encoding="utf-8", newline="")
    (conversation,) = read_conversations(path)
    assert conversation.text == "a\u2028b"


def test_half_a_surrogate_pair_is_not_a_text() -> None:
    assert all(map(is_text, ["", "a", "é😀", "\ud7ff\ue000"]))
    assert not any(map(is_text, ["a\ud800", "\udfffa", "\ud83d\ude00", None, b"a"]))
