"""`inspect`: targets are marked with and without colour, and the statistics are right."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from mlx_impl.__main__ import main
from mlx_impl.cli.inspect import histogram, print_inspection
from tests.tiny_folder import conversation_line, write_folder, write_gguf

# Tokens of <|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n
PROMPT = 1 + len("user\n") + 1 + 1 + 1 + len("assistant\n")


def write_lines(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    lines = [conversation_line("ab", "c"), conversation_line("x" * 90, "y"), json.dumps({"text": "z" * 30})]
    data = write_lines(tmp_path / "data", *lines)
    model = write_folder(tmp_path / "model")
    (model / "model.safetensors").unlink()  # inspect must not need it
    return ["inspect", "--model", str(model), "--data", str(data), "--max-seq-length", "60"]


def test_without_colour_targets_are_in_brackets(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n[[c<|im_end|>]]\n" in shown
    assert "train: 2 examples" in shown
    assert "1 of 3 train examples left out, without a target within 60 tokens: " in shown
    assert "train.jsonl:2" in shown


def test_the_statistics_match_a_count_by_hand(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A chat of 2 + 1 characters and the template; a text of 30 and EOS, whose first token is no target."""
    assert main([*arguments, "--json", "--batch-size", "1", "--num-examples", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    (file,) = result["files"].values()
    chat = PROMPT + 2 + 1 + 1
    assert (file["num_examples"], file["num_tokens"], file["num_targets"]) == (2, chat + 31, 2 + 30)
    assert sum(row["count"] for row in result["lengths"]) == 2
    inputs, widths = chat - 1 + 30, 24 + 32
    assert result["padding"]["plain"] == result["padding"]["grouped"] == pytest.approx(1 - inputs / widths)
    assert result["padding"]["packed"] == pytest.approx(1 - inputs / 56)
    assert result["examples"] == [
        [["<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n", False], ["c<|im_end|>", True]]
    ]


def test_the_first_examples_are_shown_with_their_place_their_tokens_and_what_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bytes; the last reply of the second begins at token 26 and is cut after two."""
    data = write_lines(tmp_path / "data", conversation_line("x" * 90, "y"), conversation_line("ab", "cdefg"))
    model = write_folder(tmp_path / "model")
    command = ["inspect", "--model", str(model), "--data", str(data), "--max-seq-length", str(PROMPT + 4)]
    assert main([*command, "--num-tokens", "6"]) == 0
    shown = capsys.readouterr().out
    assert f"train.jsonl:2: cut to {PROMPT + 4} of {PROMPT + 8} tokens, 2 of them targets\n" in shown
    assert re.search(rf"tokens {PROMPT - 1} to {PROMPT + 4}: \d+ 'a' \d+ 'n' \d+ 't' \d+ '\\n' \[\[", shown)
    assert re.search(r"\[\[\d+ 'c' \d+ 'd'\]\]\n", shown)
    why = f"its first target is token {PROMPT + 91} of {PROMPT + 92}, beyond the maximum of {PROMPT + 4}"
    assert f"train.jsonl:1: {why}\n" in shown
    assert main([*command, "--num-tokens", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [shown["where"] for shown in result["shown"]] == [f"{data / 'train.jsonl'}:2"]
    assert result["dropped"] == {"train": [f"{data / 'train.jsonl'}:1: {why}"]}


def test_each_dropped_row_has_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = {"role": "assistant", "content": "b", "weight": 0}
    rows = [{"messages": [{"role": "user", "content": "a"}, silent]}, {"nothing": 1}]
    lines = [json.dumps(row) for row in rows]
    data = write_lines(tmp_path / "data", *lines, conversation_line("ab", "c"))
    model = write_folder(tmp_path / "model")
    assert main(["inspect", "--model", str(model), "--data", str(data), "--skip-bad"]) == 0
    shown = capsys.readouterr().out
    assert f"train, dropped: {data / 'train.jsonl'}:2: a row must have" in shown
    assert re.search(r"train, dropped: .*train\.jsonl:1: none of its \d+ tokens is a target\n", shown)
    assert "train.jsonl:3: " in shown


def test_targets_are_coloured_on_a_terminal() -> None:
    result = {
        "files": {},
        "lengths": [{"first": 1, "last": 2, "count": 1}],
        "padding": {},
        "examples": [[("a", False), ("b\x1b[2J", True)]],
    }
    out = io.StringIO()
    print_inspection(
        result, Path("d"), Console(file=out, force_terminal=True, color_system="standard", markup=False)
    )
    assert "\x1b[32mb" in out.getvalue() and "[[" not in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()  # the data must not clear the screen


def test_inspect_works_with_the_tokenizer_of_a_gguf_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data", conversation_line("a", "b"))
    path = write_gguf(tmp_path / "tiny.gguf")
    assert main(["inspect", "--model", str(path), "--data", str(data)]) == 0
    assert "[[b<|im_end|>]]" in capsys.readouterr().out


def test_every_length_is_in_one_bin() -> None:
    lengths = [1, 7, 20, 20, 101]
    bins = histogram(lengths)
    assert [sum(b["first"] <= n <= b["last"] for b in bins) for n in lengths] == [1] * 5
    assert sum(b["count"] for b in bins) == 5
