"""Rows of a file to conversations: mixed formats, bad rows, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.text.conversation import Conversation, is_text
from mlx_impl.text.rows import Reading, read_conversations, read_data_file
from tests.tiny_folder import conversation_line

USER = {"role": "user", "content": "Hi?"}
REPLY = {"role": "assistant", "content": "Yes."}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
CALLS = [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(folder: Path, *rows: Any) -> list[Conversation]:
    return read_conversations(write(folder, *rows))


def test_a_prompt_and_its_completion_become_two_messages(tmp_path: Path) -> None:
    (conversation,) = read(tmp_path, {"prompt": "Hi?", "completion": "Yes.", "answer": "yes"})
    assert conversation.messages == (USER, REPLY)
    assert (conversation.answer, conversation.question) == ("yes", "Hi?")


def test_a_text_has_no_messages(tmp_path: Path) -> None:
    (conversation,) = read(tmp_path, {"text": "Once.", "source": "a book"})
    assert (conversation.text, conversation.messages) == ("Once.", ())


def test_tools_and_calls_are_kept_as_they_are_and_null_is_left_out(tmp_path: Path) -> None:
    """As TRL does it: a template would print None, or fail on it."""
    system = {"role": "system", "content": "Be brief."}
    null = {"role": "assistant", "content": None, "tool_calls": CALLS}
    absent = {"role": "assistant", "tool_calls": CALLS}
    result = {"role": "tool", "content": "noon", "name": "now"}
    messages = [system, USER, null, result, absent, result, REPLY]
    (conversation,) = read(tmp_path, {"messages": messages, "tools": [TOOL]})
    assert list(conversation.messages) == [system, USER, absent, result, absent, result, REPLY]
    assert conversation.tools == (TOOL,)


def test_each_line_may_have_a_format_of_its_own(tmp_path: Path) -> None:
    alpaca = {"instruction": "Hi?", "output": "Yes."}
    rows = read(tmp_path, {"text": "a"}, {"messages": [USER, REPLY], "tools": None}, alpaca, {"text": "b"})
    assert [row.text for row in rows] == ["a", None, None, "b"]
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "2", "3", "4"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl: there is no such data file"):
        read_conversations(tmp_path / "train.jsonl")


def test_bad_rows_are_skipped_only_if_asked_and_are_named(tmp_path: Path) -> None:
    good, ends_early = conversation_line("a", "b"), {"messages": [USER]}
    path = write(tmp_path, "{", good, ends_early, {"text": "a"}, {"prompt": "a"})
    with pytest.raises(ValueError, match=r"train\.jsonl:1: must be valid JSON"):
        read_conversations(path)
    data = read_data_file([path], Reading(skip_bad=True))
    assert [row.where for row in data.conversations] == [f"{path}:2", f"{path}:4"]
    (remark,) = data.remarks("training")
    assert remark.startswith(f"3 of 5 training rows were skipped: {path}:1: must be valid JSON")
    assert f"; {path}:3: " in remark and f"; {path}:5: " in remark


def test_of_many_bad_rows_the_first_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"}, *({"text": n} for n in range(8)))
    (remark,) = read_data_file([path], Reading(skip_bad=True)).remarks("test")
    assert remark.startswith("8 of 9 test rows were skipped: ")
    assert f"{path}:6: " in remark and f"{path}:7: " not in remark and remark.endswith("; and 3 more")


def test_a_file_of_bad_rows_alone_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": 1}, {"text": 2})
    with pytest.raises(ValueError, match=r'no row can be read; the first: .*train\.jsonl:1: "text" must'):
        read_data_file([path], Reading(skip_bad=True))


def test_what_means_nothing_is_named_once(tmp_path: Path) -> None:
    asked = {**USER, "time": "noon", "name": "Ann"}
    rows: list[Any] = [{"messages": [asked, REPLY], "id": n, "score": None} for n in range(9)]
    data = read_data_file([write(tmp_path, *rows, {"text": "a", "source": "b"})], Reading())
    assert data.remarks("training") == [
        "columns of the training data that are not used: id, source",
        "keys in messages of the training data that only a chat template may use: time",
    ]


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b", "a")]
    for path in paths:
        path.write_text(json.dumps({"text": path.name}))
    assert [c.text for c in read_data_file(paths, Reading()).conversations] == ["b", "a"]


def test_reasoning_may_be_written_into_the_reply(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [USER, {**REPLY, "reasoning": "Hm."}, USER, REPLY]})
    (found,) = read_conversations(path, Reading(inline_reasoning=True))
    assert found.messages[1] == {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    assert found.messages[3] == REPLY


def test_half_a_surrogate_pair_is_not_a_text() -> None:
    assert all(map(is_text, ["", "a", "é😀", "\ud7ff\ue000"]))
    assert not any(map(is_text, ["a\ud800", "\udfffa", "\ud83d\ude00", None, b"a"]))
