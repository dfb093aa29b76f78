"""The user's own data from the command line: other formats, columns, bad rows, reasoning, base models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_impl.__main__ import main
from tests.tiny_folder import TEMPLATE, conversation_line, write_folder

TURN = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
QUICK = ["--blas", "off", "--iters", "2", "--batch-size", "2", "--rank", "2", "--no-compile"]


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path.parent


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_folder(tmp_path / "model"))


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A model without a chat template."""
    folder = write_folder(tmp_path / "base")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return str(folder)


def shown(capsys: pytest.CaptureFixture[str], model: str, data: Path, *flags: str) -> list[str]:
    """The training examples, their targets between « and »."""
    arguments = ["inspect", "--model", model, "--data", str(data), "--num-examples", "99", "--json", *flags]
    assert main(arguments) == 0
    examples = json.loads(capsys.readouterr().out)["examples"]
    return ["".join(f"«{text}»" if target else text for text, target in spans) for spans in examples]


ROW = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n«c<|im_end|>»"


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train-00000-of-00001.jsonl"])
def test_other_formats_and_columns_are_the_same_examples(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    sharegpt = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "c"}]
    rows = [
        {"conversations": sharegpt},
        {"instruction": "ab", "output": "c"},
        {"prompt": "ab", "completion": "c"},
    ]
    assert shown(capsys, model, write(tmp_path / "data" / name, *rows)) == [ROW] * 3
    array = write(tmp_path / "array" / name, json.dumps([{"q": "ab", "answer": "c"}], indent=1))
    assert shown(capsys, model, array, "--columns", "prompt=q,completion=answer") == [ROW]


def test_bad_rows_end_the_command_unless_they_are_skipped(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data" / "train.jsonl", {"messages": TURN}, {"messages": TURN[:1]}, "{")
    command = ["inspect", "--model", model, "--data", str(data)]
    assert main(command) == 2
    assert "train.jsonl:2: " in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "train: 1 examples" in printed
    assert "2 of 3 train rows were skipped: " in printed
    assert "train.jsonl:2: " in printed and "train.jsonl:3: must be valid JSON" in printed


@pytest.mark.parametrize("name", ["validation", "val", "eval"])
def test_training_tells_what_it_reads_and_what_not(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    rows = [{"question": "x" * n, "answer": "yes", "id": n} for n in range(1, 4)]
    data = write(tmp_path / "data" / "train.jsonl", *rows, {"question": 3, "answer": "no"})
    write(tmp_path / "data" / f"{name}.jsonl", *rows)
    (data / "test.jsonl").touch()
    run = tmp_path / "run"
    flags = ["--columns", "prompt=question,completion=answer", "--skip-bad", "--adapter-path", str(run)]
    assert main(["train", "--model", model, "--data", str(data), *QUICK, *flags]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 training and 3 validation examples" in printed
    assert f"{name}.jsonl is read as valid.jsonl" in printed and "test.jsonl is empty" in printed
    assert "1 of 4 training rows was skipped: " in printed and 'train.jsonl:4: "prompt" must be a' in printed
    assert printed.count("columns of the training data that are not used: id") == 1
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["columns"], settings["skip_bad"]) == (flags[1], True)
    again = ["--config", str(run / "config.yaml"), "--adapter-path", str(tmp_path / "again"), "--blas", "off"]
    assert main(["train", *again]) == 0
    one, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in (run, tmp_path / "again"))
    assert one == other


def test_a_settings_file_may_list_the_columns(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data" / "train.jsonl", {"q": "a", "a": "b"})
    config = tmp_path / "config.yaml"
    config.write_text("columns:\n  prompt: q\n  completion: a\nreasoning: template\niters: 1\n")
    command = ["train", "--model", model, "--data", str(data), "--config", str(config), "--blas", "off"]
    assert main([*command, "--adapter-path", str(tmp_path / "run")]) == 0
    config.write_text("columns: [q]\n")
    assert main([*command, "--adapter-path", str(tmp_path / "other")]) == 2
    assert "columns must be a string or names with names" in capsys.readouterr().err


def test_reasoning_is_kept_or_dropped_only_by_choice(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [TURN[0], {**TURN[1], "reasoning_content": "why"}]}
    data = write(tmp_path / "data" / "train.jsonl", row)
    assert main(["inspect", "--model", model, "--data", str(data)]) == 2
    refused = " ".join(capsys.readouterr().err.split())
    assert 'train.jsonl:1: the chat template must show the "reasoning_content" of message 2' in refused
    assert "--reasoning inline" in refused and "--reasoning template" in refused
    assert shown(capsys, model, data, "--reasoning", "template") == [ROW]
    inline = ROW.replace("«c", "«<think>\nwhy\n</think>\n\nc")
    assert shown(capsys, model, data, "--reasoning", "inline") == [inline]


def test_a_base_model_trains_and_answers_without_a_template(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "Q: ab\nA:", "completion": " c", "answer": "c"}
    data, run = write(tmp_path / "data" / "train.jsonl", row, row), tmp_path / "run"
    write(data / "test.jsonl", row)
    assert shown(capsys, base, data) == ["Q: ab\nA:« c<|im_end|>»"] * 2
    assert main(["train", "--model", base, "--data", str(data), *QUICK, "--adapter-path", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert {"trained_before", "unseen_after"} <= report.keys()
    capsys.readouterr()
    flags = ["--model", base, "--blas", "off", "--adapter-path", str(run)]
    assert main(["generate", *flags, "--prompt", row["prompt"], "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert len(tokens) == len(row["prompt"])
    assert main(["generate", *flags, "--prompt", "a", "--system", "b"]) == 2
    assert "must have a chat template to read messages" in capsys.readouterr().err


def test_a_base_model_refuses_messages_by_line(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data" / "train.jsonl", {"text": "a"}, conversation_line("a", "b"))
    assert main(["inspect", "--model", base, "--data", str(data)]) == 2
    assert "train.jsonl:2: the model must have a chat template to read messages" in capsys.readouterr().err


def test_with_skipping_a_question_that_the_template_refuses_is_not_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "model")
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    (folder / "chat_template.jinja").write_text(strict)
    bad = [{"role": "system", "content": "s"}, *TURN]
    rows = [{"messages": TURN, "answer": "c"}, {"messages": bad, "answer": "c"}]
    data = write(tmp_path / "data" / "train.jsonl", *rows)
    command = ["train", "--model", str(folder), "--data", str(data), *QUICK, "--adapter-path"]
    assert main([*command, str(tmp_path / "one")]) == 2
    assert "train.jsonl:2: the chat template refuses" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "two"), "--skip-bad"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 training rows was skipped: " in printed and "a question is not asked: " in printed


def test_evaluate_reads_the_same_formats(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write(tmp_path / "plain" / "test.jsonl", {"messages": TURN})
    other = write(tmp_path / "other" / "test.json", json.dumps([{"q": "ab", "a": "c"}, {"q": 1, "a": "c"}]))
    results = []
    for data, flags in ((plain, []), (other, ["--columns", "prompt=q,completion=a", "--skip-bad"])):
        assert (
            main(["evaluate", "--model", model, "--data", str(data), "--blas", "off", "--json", *flags]) == 0
        )
        captured = capsys.readouterr()
        results.append(json.loads(captured.out))
    assert results[0] == results[1]
    assert "1 of 2 test rows was skipped" in " ".join(captured.err.split())


def test_the_folder_is_described_where_it_has_no_training_data(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data" / "data.csv", "a,b")
    assert main(["inspect", "--model", model, "--data", str(data)]) == 2
    refused = " ".join(capsys.readouterr().err.split())
    assert "train.jsonl: there is no such data file" in refused and "the folder holds data.csv" in refused
