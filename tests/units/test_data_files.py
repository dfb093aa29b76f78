"""Data files: JSON Lines, a JSON array, gzip and parquet hold the same rows; damage is named by its line."""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.text.data_files import MAX_LINE_BYTES, raw_rows
from mlx_impl.text.data_folder import find_files, other_spellings, require_files
from mlx_impl.text.rows import read_conversations
from tests.tiny_folder import conversation_line

ROWS: list[dict[str, Any]] = [{"text": "a"}, {"text": "b\u2028é", "n": [1, {"x": None}]}, {"text": "["}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "lines": lambda path: path.write_text(LINES),
    "lines of a Windows editor": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode()
    ),
    "array in one line": lambda path: path.write_text(json.dumps(ROWS)),
    "array over many lines": lambda path: path.write_text("\n" + json.dumps(ROWS, indent=2) + "\n"),
    "array with a byte order mark": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode()
    ),
    "gzip": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "gzip in two members": lambda path: path.write_bytes(
        gzip.compress(LINES[:5].encode()) + gzip.compress(LINES[5:].encode())
    ),
    "array in gzip": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.jsonl.gz", "x"])
def test_the_same_rows_in_every_kind_of_file(
    tmp_path: Path, name: str, write: Callable[[Path], object]
) -> None:
    path = tmp_path / name
    write(path)
    assert [row for _, row in raw_rows(path)] == ROWS


def test_parquet_holds_the_same_conversations(tmp_path: Path) -> None:
    """Arrow gives every message the keys of all; the null ones are left out again."""
    call = {"function": {"name": "now", "arguments": '{"a": 1}'}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": None},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]},
        {"text": "c"},
    ]
    path = tmp_path / "train.parquet"
    write_parquet(path, rows)
    first, second, third = read_conversations(path)
    assert list(first.messages) == rows[0]["messages"]
    assert second.messages[1]["tool_calls"] == [{"function": {"name": "now", "arguments": {"a": 1}}}]
    assert (third.text, third.where) == ("c", f"{path}:3")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 and more")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r'train\.parquet: parquet is read by pyarrow: pip install "\.\[parquet\]"'
    ):
        read_conversations(path)


def test_damaged_parquet_is_a_one_line_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"^[^\n]*train\.parquet: must be a parquet file: [^\n]*$"):
        read_conversations(path)


@pytest.mark.parametrize(("lines", "numbers"), [("[\n{},\n\n{}, {}\n]", [2, 4, 4]), ("\n\n[{}]\n", [3])])
def test_an_item_of_an_array_has_the_line_on_which_it_begins(
    tmp_path: Path, lines: str, numbers: list[int]
) -> None:
    path = tmp_path / "train.json"
    path.write_text(lines)
    assert [where for where, _ in raw_rows(path)] == [f"{path}:{number}" for number in numbers]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n{", r"train\.jsonl:2: must be valid JSON"),
        ('{"messages": ' + "1" * 5000 + "}", r"train\.jsonl:1: must be valid JSON"),
        ("[" * 100_000, r"train\.jsonl:1: must be valid JSON"),
        ('{"text": "\\ud800"}', r"train\.jsonl:1: texts must be valid Unicode, got half a surrogate pair"),
        ('[{},\n{"text": "\\ud800"}]', r"train\.jsonl:2: texts must be valid Unicode"),
        ("[{},\n{}", r"train\.jsonl:2: must be valid JSON: after an item of the array must come , or \]"),
        ("[{},\n{}, ]", r"train\.jsonl:2: must be valid JSON: after the last item"),
        ("[{},\n{} {}]", r"train\.jsonl:2: must be valid JSON: after an item"),
        ("[{},\n{]", r"train\.jsonl:2: must be valid JSON: Expecting property name"),
        ("[{},\n", r"train\.jsonl:2: must be valid JSON"),
        ("[{}]\n{}", r"train\.jsonl: must end after its JSON array"),
        ('{\n"a": [{}],\n"b": 2\n}\n', "JSON Lines or a JSON array of rows, got one object with 'a', 'b'"),
        ("version https://git-lfs.github.com/spec/v1\noid 1", r"train\.jsonl: is a Git LFS pointer"),
        (b"\xff\xfe\x00", r"train\.jsonl:1: must be UTF-8 text"),
        (b'[{"text": "\xff"}]', r"train\.jsonl: must be UTF-8 text"),
        (gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-12], r"train\.jsonl: must be a whole gzip file"),
        (b"\x1f\x8b and no gzip", r"train\.jsonl: must be a whole gzip file"),
        ("", "must hold at least one example, got an empty file"),
        ("\n  \n", "must hold at least one example, got an empty file"),
        ("[]", "must hold at least one example, got an empty file"),
    ],
)  # fmt: skip
def test_damage_is_named_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "train.jsonl"
    data = content if isinstance(content, bytes) else content.replace("{}", '{"text": "a"}').encode()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_conversations(path)
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


def test_an_array_may_be_longer_than_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_impl.text.data_files.MAX_LINE_BYTES", 10)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(ROWS))
    assert [row for _, row in raw_rows(path)] == ROWS
    monkeypatch.setattr("mlx_impl.text.data_files.MAX_JSON_BYTES", 30)
    with pytest.raises(
        ValueError, match=r"train\.json: a JSON array must have at most 30 bytes: use JSON Lines"
    ):
        list(raw_rows(path))


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).write_text("{}")
    return path


SHARDS = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")


@pytest.mark.parametrize(
    ("names", "name", "found"),
    [
        (("train.jsonl", "valid.jsonl"), "train", ["train.jsonl"]),
        (("train.json",), "train", ["train.json"]),
        (("train.jsonl.gz",), "train", ["train.jsonl.gz"]),
        (("train.parquet",), "train", ["train.parquet"]),
        ((*SHARDS, "test-00000-of-00001.parquet"), "train", [*SHARDS]),
        (("validation.jsonl",), "valid", ["validation.jsonl"]),
        (("val.jsonl",), "valid", ["val.jsonl"]),
        (("eval.jsonl",), "valid", ["eval.jsonl"]),
        (("dev.json",), "valid", ["dev.json"]),
        (("valid.jsonl", "eval.jsonl"), "valid", ["valid.jsonl"]),
        (("train.csv", "training.jsonl", "valid.jsonl"), "train", []),
        ((), "train", []),
    ],
)
def test_a_file_is_found_by_its_usual_names(
    tmp_path: Path, names: tuple[str, ...], name: str, found: list[str]
) -> None:
    assert [path.name for path in find_files(folder_of(tmp_path, *names), name)] == found


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.jsonl", "train.json"), r"must hold one train file, got train\.jsonl, train\.json"),
        (("train.jsonl", "train-00000-of-00001.json"), "must hold one train file"),
        (SHARDS[1:], r"must hold every shard of train once, got train-00001-of-00002\.parquet"),
        (("train-00000-of-00001.json", "train-00000-of-00001.parquet"), "every shard of train once"),
        (("data.csv", "x.jsonl"), r"train\.jsonl: there is no such data file .*holds data\.csv, x\.jsonl"),
        ((), r"train\.jsonl: there is no such data file .*holds nothing"),
        (tuple(f"{n}.txt" for n in range(10)), r"0\.txt, .*7\.txt and 2 more"),
    ],
)
def test_a_file_that_is_not_there_once_is_an_error(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_files(folder_of(tmp_path, *names), "train")


def test_validation_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path, "val.jsonl")
    assert other_spellings(tmp_path, "valid") == []
    folder_of(tmp_path, "valid.jsonl", "eval.jsonl")
    assert other_spellings(tmp_path, "valid") == ["val.jsonl", "eval.jsonl"]
    assert other_spellings(tmp_path, "train") == []
