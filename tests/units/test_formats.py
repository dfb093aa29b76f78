"""Rows as other programs write them: each format becomes the same conversation, or is refused by name.

Expected messages are written by hand, after TRL's documentation of its dataset formats, the files of ShareGPT
and Alpaca, OpenAI's documentation of fine-tuning, and transformers' of chat templates.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.text.columns import parse_columns, to_conversation
from mlx_impl.text.conversation import Conversation
from mlx_impl.text.rows import Reading, read_conversations, read_data_file

ASK = {"role": "user", "content": "Hi?"}
REPLY = {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"name": "now", "arguments": {"zone": "UTC", "of": None}}
AS_TEXT = {"name": "now", "arguments": '{"zone": "UTC", "of": null}'}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


def read(row: Any, columns: str = "") -> Conversation:
    return to_conversation(row, "data.jsonl:1", parse_columns(columns) if columns else {})[0]


def replying(**message: Any) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", **message}]}


ONE_TURN = {
    "messages": {"messages": [ASK, REPLY]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
    "ShareGPT, other names": {
        "conversations": [{"from": "user", "value": "Hi?"}, {"from": "assistant", "value": "Yes."}]
    },
    "from and value under messages": {
        "messages": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
    },
    "role and content under conversations": {"conversations": [ASK, REPLY]},
    "Alpaca": {"instruction": "Hi?", "input": "", "output": "Yes."},
    "Alpaca without input": {"instruction": "Hi?", "output": "Yes."},
    "prompt and completion": {"prompt": "Hi?", "completion": "Yes."},
    "conversational prompt and completion": {"prompt": [ASK], "completion": [REPLY]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes.", "image": None}]},
        ]
    },
    "JSON text": {"messages": json.dumps([ASK, {**REPLY, "name": None}])},
    "ShareGPT, capitals": {
        "conversations": [{"from": "Human", "value": "Hi?"}, {"from": "GPT", "value": "Yes."}]
    },
    "no tools as JSON text": {"messages": [ASK, REPLY], "tools": "null"},
    "null columns": {"messages": [ASK, REPLY], "text": None, "prompt": None, "tools": None, "system": None},
    "null keys": {"messages": [{**ASK, "name": None, "tool_calls": None}, {**REPLY, "weight": None}]},
    "an empty system prompt, no tools": {"messages": [ASK, REPLY], "system": "", "tools": "[]"},
}


@pytest.mark.parametrize("row", ONE_TURN.values(), ids=ONE_TURN)
def test_one_turn_is_the_same_in_every_format(row: dict[str, Any]) -> None:
    found = read(row)
    assert found.messages == (ASK, REPLY)
    assert (found.text, found.tools, found.answer, found.untrained) == (None, None, None, frozenset())


@pytest.mark.parametrize("row", ONE_TURN.values(), ids=ONE_TURN)
def test_a_system_prompt_in_a_column_of_its_own_comes_first(row: dict[str, Any]) -> None:
    found = read({**row, "system": "Be brief.", "answer": "yes", "tools": [TOOL]})
    assert found.messages == (SYSTEM, ASK, REPLY)
    assert (found.answer, found.tools, found.is_plain) == ("yes", (TOOL,), False)


THREE = ("system", "human", "chatgpt")
MORE_TURNS = [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["Add.\n1 2", "3"]),
    ({"instruction": "b?", "output": "B", "history": [["a?", "A"]]}, ["a?", "A", "b?", "B"]),
    ({"prompt": [SYSTEM, REPLY, ASK], "completion": [REPLY]}, ["Be brief.", "Yes.", "Hi?", "Yes."]),
    ({"conversations": [{"from": who, "value": who} for who in THREE]}, [*THREE]),
]


@pytest.mark.parametrize(("row", "contents"), MORE_TURNS)
def test_more_than_one_turn(row: dict[str, Any], contents: list[str]) -> None:
    found = read(row)
    assert [message["content"] for message in found.messages] == contents
    assert found.messages[-1]["role"] == "assistant"


@pytest.mark.parametrize(("answer", "text"), [(42, "42"), (2.5, "2.5"), ("a", "a")])
def test_an_answer_may_be_a_number(answer: Any, text: str) -> None:
    assert read({"messages": [ASK, REPLY], "answer": answer}).answer == text


@pytest.mark.parametrize("depth", [300, 450, 600, 900])
def test_a_row_of_any_depth_is_read_or_refused(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "train.jsonl"
    for nested in ("[" * depth + "]" * depth, '{"function": ' * depth + "{}" + "}" * depth):
        calls = '{"role": "user", "content": "\\u00e9", "tool_calls": [' + nested + "]}"
        path.write_text('{"messages": [' + calls + "]}")
        with pytest.raises(ValueError, match=r"train\.jsonl:1: "):
            read_conversations(path)


def test_only_two_texts_may_be_read_by_a_model_without_a_template() -> None:
    plain = [name for name, row in ONE_TURN.items() if read(row).is_plain]
    assert plain == ["prompt and completion"]


def test_the_replies_of_a_prompt_are_counted_as_prompt() -> None:
    assert read({"prompt": [ASK, REPLY, ASK], "completion": [REPLY]}).num_prompt == 3
    assert read({"prompt": [ASK], "completion": [REPLY], "system": "s"}).num_prompt == 2
    assert read({"messages": [ASK, REPLY]}).num_prompt == 0


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_may_be_json_texts(tools: Any) -> None:
    assert read({"messages": [ASK, REPLY], "tools": tools}).tools == (TOOL,)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"type": "function", "function": AS_TEXT}, {"type": "function", "function": CALL}),
        (AS_TEXT, CALL),
        ({"function": {"name": "now", "arguments": ""}}, {"function": {"name": "now", "arguments": {}}}),
        ({"function": {"name": "now", "arguments": {"a": [1]}}},) * 2,
        ({"function": {"name": "now"}},) * 2,
    ],
)
def test_arguments_are_objects_and_never_texts(call: dict[str, Any], expected: dict[str, Any]) -> None:
    for calls in ([call], json.dumps([call])):
        reply = read(replying(content=None, tool_calls=calls)).messages[-1]
        assert reply == {"role": "assistant", "tool_calls": [expected]}


def test_a_null_among_arguments_is_left_out_unless_a_json_text_has_it() -> None:
    """Somebody wrote the one in a text; another may be parquet's, and TRL leaves it out."""
    for arguments, expected in (
        (CALL["arguments"], {"zone": "UTC"}),
        (AS_TEXT["arguments"], CALL["arguments"]),
    ):
        reply = read(replying(tool_calls=[{"name": "now", "arguments": arguments}])).messages[-1]
        assert reply["tool_calls"] == [{"name": "now", "arguments": expected}]


def test_calls_and_results_of_sharegpt_have_roles_of_their_own() -> None:
    turns = [
        ("human", "Time?"),
        ("function_call", json.dumps(AS_TEXT)),
        ("observation", "noon"),
        ("gpt", "Noon."),
    ]
    found = read({"conversations": [{"from": who, "value": value} for who, value in turns], "tools": "[]"})
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_gets_the_names_that_transformers_gives_it(name: str) -> None:
    """transformers 5.23, chat_template_utils: `reasoning_content` and `thinking`, beside the given name."""
    reply = read(replying(content="Yes.", **{name: "Hm."})).messages[-1]
    assert reply == {**REPLY, name: "Hm.", "reasoning_content": "Hm.", "thinking": "Hm."}


def test_empty_reasoning_is_none() -> None:
    assert read(replying(content="Yes.", reasoning_content="", thinking=None)).messages[-1] == REPLY


@pytest.mark.parametrize(
    ("mark", "untrained"),
    [
        ({"weight": 0}, {1}),
        ({"weight": 0.0}, {1}),
        ({"train": False}, {1}),
        ({"weight": 1, "train": False}, {1}),
        ({"weight": 1}, set()),
        ({"train": True}, set()),
        ({}, set()),
    ],
)
def test_a_message_without_weight_is_no_target(mark: dict[str, Any], untrained: set[int]) -> None:
    found = read({"messages": [ASK, {**REPLY, **mark}, ASK, REPLY]})
    assert found.messages == (ASK, REPLY, ASK, REPLY)
    assert found.untrained == untrained
    sharegpt = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes.", **mark}]
    shifted = read(
        {"conversations": [*sharegpt, *sharegpt[:1], {"from": "gpt", "value": "."}], "system": "s"}
    )
    assert shifted.untrained == {i + 1 for i in untrained}
    prompted = read({"prompt": [ASK, {**REPLY, **mark}, ASK], "completion": [REPLY]})
    assert prompted.untrained == untrained


def test_a_completion_without_weight_is_no_target() -> None:
    assert read({"prompt": [ASK], "completion": [{**REPLY, "weight": 0}]}).untrained == {1}


COLUMNS = [
    ({"question": "Hi?", "answer": "Yes."}, "prompt=question,completion=answer"),
    (
        {"question": "Hi?", "answer": "Yes.", "prompt": "no", "text": "no"},
        "prompt=question,completion=answer",
    ),
    ({"instruction": "Hi?", "context": None, "response": "Yes."}, "input=context,output=response"),
    ({"instruction": "Hi?", "output": "Yes.", "text": "all of it"}, "instruction=instruction"),
    ({"dialog": [ASK, REPLY], "id": 3}, " messages = dialog "),
    ({"turns": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}, "conversations=turns"),
    ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, "completion=chosen"),
]


@pytest.mark.parametrize(("row", "columns"), COLUMNS)
def test_columns_have_other_names(row: dict[str, Any], columns: str) -> None:
    found = read(row, columns)
    assert (found.messages, found.answer) == ((ASK, REPLY), None)


def test_a_text_may_have_another_name() -> None:
    assert read({"body": "Once.", "messages": [ASK, REPLY]}, "text=body").text == "Once."


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"question": "a", "answer": "b"}, "prompt=question,completion=answer"),
        ({"prompt": "a", "response": "b", "id": 3}, "prompt=prompt,completion=response"),
        ({"input": "a", "output": "b"}, "prompt=input,completion=output"),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            "instruction=instruction,output=response,input=context",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt=prompt,completion=chosen"),
        ({"content": "a"}, "text=content"),
        ({"Question": "a", "Answer": "b"}, "prompt=Question,completion=Answer"),
        ({"dialogue": [ASK, REPLY]}, "messages=dialogue"),
        ({"chosen": [ASK, REPLY], "rejected": [ASK, REPLY]}, "messages=chosen"),
    ],
)
def test_the_advice_for_an_unknown_row_reads_it(row: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"try --columns {advice}")) as caught:
        read(row)
    assert all(f'"{name}"' in str(caught.value) for name in row)
    assert read(row, advice)


@pytest.mark.parametrize("name", ["a,b", " question", "question\n", "question\x1b"])
def test_there_is_no_advice_that_could_not_be_followed(name: str) -> None:
    with pytest.raises(ValueError, match=r"and --columns can rename$") as caught:
        read({name: "a", "response": "b"})
    assert str(caught.value).isprintable()


WRONG = [
    ([1], "a row must be an object, got list"),
    ({}, 'a row must have "messages", "conversations", "prompt" and "completion", .* got nothing'),
    ({"prompt": "a"}, 'got "prompt", and --columns can rename'),
    ({"prompt": "a", "completion": None}, 'got "prompt", and null in "completion"'),
    ({"messages": [ASK, REPLY], "text": "a"}, 'got "messages" and "text": choose one, as --columns mess'),
    ({"text": 3}, '"text" must be a text, got int'),
    ({"text": "a", "answer": "a"}, '"answer" must belong to a reply'),
    ({"prompt": 3, "completion": "a"}, '"prompt" must be a text, got int'),
    ({"prompt": "a", "completion": [REPLY]}, '"prompt" must be a list of messages, got str'),
    ({"prompt": [ASK], "completion": [REPLY, ASK, REPLY]}, 'message of role "assistant", got assistant, u'),
    ({"prompt": [ASK], "completion": []}, '"completion" must be a list of messages, got an empty list'),
    ({"instruction": "a", "output": ["b"]}, '"output" must be a text, got list'),
    ({"instruction": "a", "output": "b", "history": ["c"]}, '"history" must be a list of pairs of texts'),
    ({"messages": "a"}, '"messages" must be a list of messages, got str'),
    ({"messages": [{"role": "user"}]}, 'message 1 of "messages" must have a text as "content", and has none'),
    ({"messages": [ASK, "b"]}, 'message 2 of "messages" must be an object, got str'),
    ({"messages": [ASK]}, 'must end with the reply .* got 1 messages that end with role \'user\''),
    ({"messages": [REPLY]}, 'must end with the reply'),
    ({"conversations": [{"from": "human"}]}, 'message 1 of "conversations" must have a text as "content"'),
    ({"conversations": [{"value": "a"}]}, '"from" and "value", got \'value\''),
    ({"messages": [SYSTEM, ASK, REPLY], "system": "b"}, '"system" must not be there where "messages" begins'),
    ({"messages": [ASK, REPLY], "system": 3}, '"system" must be a text, got int'),
    ({"messages": [ASK, REPLY], "tools": ["now"]}, '"tools" must be a list of objects'),
    ({"messages": [ASK, REPLY], "tools": "now"}, '"tools" must be a list of objects'),
    ({"messages": [ASK, REPLY], "tools": {"a": 1}}, '"tools" must be a list of objects'),
    ({"messages": [ASK, REPLY], "images": ["a.png"]}, '"images" must not be there: only texts can be read'),
    ({"messages": [ASK, REPLY], "chat_template_kwargs": {"a": 1}}, '"chat_template_kwargs" must not be'),
    (replying(content=None), 'message 2 of "messages" must have a text as "content", and has none'),
    (replying(content=3), 'must have a text as "content", got int'),
    (replying(content=[{"type": "image_url"}]), "text parts as \"content\", got a part of type 'image_url'"),
    (replying(content=["b"]), "got a part of type 'str'"),
    (replying(tool_calls="now"), 'must have JSON as "tool_calls", got \'now\''),
    (replying(tool_calls={}), 'must have a list of objects as "tool_calls", got dict'),
    (replying(tool_calls=["now"]), 'must have a list of objects as "tool_calls", got one with str'),
    (replying(tool_calls=[{"function": {"arguments": "now"}}]), 'must have JSON as "arguments", got \'now\''),
    (replying(tool_calls=[{"function": {"arguments": "[1]"}}]), 'must have an object as "arguments"'),
    (replying(content="b", function_call={"name": "now"}), 'has "function_call", .* write "tool_calls"'),
    (replying(content="b", reasoning=["c"]), 'must have a text as "reasoning", got list'),
    (replying(content="b", reasoning="c", thinking="d"), "must have one reasoning, got different ones"),
    (replying(content="b", weight=0.5), 'must have a "weight" of 0 or 1, got 0.5'),
    (replying(content="b", weight="0"), "must have a \"weight\" of 0 or 1, got '0'"),
    (replying(content="b", train="no"), "must have true or false as \"train\", got 'no'"),
    (replying(content="b", train_detail=[]), 'has "train_detail"'),
    ({"messages": [ASK, REPLY], "answer": [3]}, '"answer" must be a text with a letter or a digit, got .3.'),
    ({"messages": [ASK, REPLY], "functions": [TOOL]}, '"functions" must not be there: write "tools" instead'),
    (replying(content="b", loss=False), 'has "loss", which cannot be read: write "weight": 0'),
    ({"messages": [ASK, REPLY], "answer": "!"}, "got '!'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_what_cannot_be_read_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": [ASK, REPLY]}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("", "must be NAME=COLUMN"),
        ("prompt", "must be NAME=COLUMN"),
        ("prompt=", "must be NAME=COLUMN"),
        ("=a", "must be NAME=COLUMN"),
        ("prompt=a,prompt=b", "with different names"),
        ("question=prompt", "must name one of messages, .*, got 'question'"),
    ],
)
def test_columns_in_another_form_are_refused(columns: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_columns(columns)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    row = {"question": "a", "reply": "b"}
    with pytest.raises(ValueError, match='--columns names "answer", and the row has "question", "reply"'):
        read(row, "prompt=question,completion=answer")
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row))
    columns = {"prompt": "question", "completion": "reply", "system": "sytem"}
    with pytest.raises(ValueError, match='--columns names "sytem", and no row has it'):
        read_data_file([path], Reading(columns))


@pytest.mark.parametrize(
    ("row", "columns", "unused"),
    [
        ({"text": "a", "source": "b", "id": 3, "url": None}, "", {"source", "id"}),
        ({"text": "a", "tools": [TOOL], "system": "b"}, "", {"tools", "system"}),
        ({"prompt": "a", "messages": [ASK, REPLY]}, "", {"prompt"}),
        ({"question": "a", "answer": "b", "prompt": "c"}, "prompt=question,completion=answer", {"prompt"}),
        ({"instruction": "a", "output": "b", "input": "", "text": "c"}, "output=output", {"text"}),
        ({"messages": [ASK, REPLY], "tools": [TOOL], "answer": "yes", "system": "b"}, "", set()),
    ],
)
def test_columns_that_mean_nothing_are_told(row: dict[str, Any], columns: str, unused: set[str]) -> None:
    assert to_conversation(row, "d:1", parse_columns(columns) if columns else {})[1] == unused
