"""What `train` tells at its end, for every kind of data: answers, losses, the best step, next commands."""

from __future__ import annotations

import io
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.shell_command import shell_command
from mlx_impl.cli.training.answers import Answer
from tests.tiny_folder import conversation_line, write_data, write_folder

TINY = ["--rank", "2", "--iters", "2", "--blas", "off"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("model")))


def write(folder: Path, rows: list[str], *names: str) -> Path:
    folder.mkdir()
    for name in names or ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def train(model: str, data: Path, *flags: str) -> dict[str, Any]:
    run = data.with_name(f"run {len(list(data.parent.iterdir()))}")
    if "--adapter-path" in flags:
        run = Path(flags[flags.index("--adapter-path") + 1])
    command = ["train", "--model", model, "--data", str(data), "--adapter-path", str(run)]
    assert main([*command, *TINY, *flags]) == 0
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


PLAIN = [conversation_line(f"question {n}", f"reply {n}") for n in range(8)]
TEXTS = [json.dumps({"text": f"some words of text number {n}, and more of them"}) for n in range(8)]
PAIRS = [json.dumps({"prompt": f"question {n}", "completion": f"reply {n}"}) for n in range(8)]


@pytest.mark.parametrize("rows", [PLAIN, TEXTS, PAIRS], ids=["messages", "texts", "pairs"])
def test_data_without_answers_has_samples_before_and_after(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str]
) -> None:
    report = train(model, write(tmp_path / "data", rows))
    samples = report["answers"]["sample"]
    assert len(samples) == 3 and all(row["question"] and row["reply"] for row in samples)
    assert all({"before", "after"} <= row.keys() and row["expected"] is None for row in samples)
    assert {row["verdict_after"] for row in samples} <= {"", "cut"}
    assert "sample_before" not in report
    shown = capsys.readouterr().out
    assert "sample: question" in shown and "right" not in shown


def test_samples_are_held_out_where_there_are_held_out_rows(model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data", PLAIN)
    (data / "valid.jsonl").write_text(conversation_line("held out", "yes"))
    assert [row["question"] for row in train(model, data)["answers"]["sample"]] == ["held out"]
    (data / "valid.jsonl").unlink()
    assert train(model, data)["answers"]["sample"][0]["question"] == "question 0"


def test_a_row_that_cannot_be_asked_is_no_sample(model: str, tmp_path: Path) -> None:
    """Of a text of one word and of prompts that are too long nothing is asked."""
    rows = [json.dumps({"text": "word"}), conversation_line("x" * 300, "y")]
    report = train(model, write(tmp_path / "data", rows), "--max-seq-length", "100", "--targets", "all")
    assert report["answers"] == {}


def test_the_report_has_loss_and_perplexity_on_held_out_rows(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = train(model, write(tmp_path / "data", PLAIN))
    for when in ("first", "last", "best"):
        assert report[f"valid_perplexity_{when}"] == pytest.approx(math.exp(report[f"valid_loss_{when}"]))
    steps, losses = zip(*report["validation"], strict=True)
    assert report["valid_loss_best"] == min(losses)
    assert report["valid_best_step"] == steps[losses.index(min(losses))]
    shown = capsys.readouterr().out
    first, last = (f"{report[f'valid_loss_{when}']:.3f}" for when in ("first", "last"))
    assert f"held-out:  loss {first} -> {last}, perplexity" in shown
    assert f"(best: step {report['valid_best_step']})" in shown


def test_without_held_out_rows_it_says_so(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = train(model, write(tmp_path / "data", PLAIN, "train"))
    assert report["valid_perplexity_last"] is None and report["validation"] == []
    assert "held-out:  none: with valid.jsonl" in capsys.readouterr().out


def test_the_next_commands_run_as_they_are_printed(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where names have spaces."""
    train(model, write(tmp_path / "my data", PLAIN), "--adapter-path", str(tmp_path / "my run"))
    lines = capsys.readouterr().out.partition("\nnext:\n")[2].splitlines()
    commands = [line.strip() for line in lines if not line.startswith("  #")]
    words = [shlex.split(command.removeprefix(shell_command()))[0] for command in commands]
    assert words == ["generate", "generate", "fuse", "train"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))  # of the chat
    for command in commands:
        assert main(shlex.split(command.removeprefix(shell_command()))) == 0, command
    again = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("my run", "my run-2")]
    assert again[0]["loss_last"] == again[1]["loss_last"]


def test_an_answer_that_was_cut_is_cut_and_not_wrong() -> None:
    assert Answer("?", "yes", "well, I think", is_cut=True).verdict == "cut"
    assert Answer("?", "yes", "well, yes, I", is_cut=True).verdict == "right"
    assert Answer("?", "yes", "no").verdict == "wrong"
    assert Answer("?", None, "no").verdict == ""


@pytest.mark.parametrize(("flags", "expected"), [([], 61), (["--max-answer-tokens", "7"], 7)])
def test_an_answer_has_as_many_tokens_as_the_longest_reply_of_the_file(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: int
) -> None:
    """60 letters, a token each, and the end of the turn; the row of that reply names no answer."""
    rows = [conversation_line("a", "yes", answer="yes"), conversation_line("b", "x" * 60)]
    report = train(model, write(tmp_path / "data", rows), *flags)
    assert report["max_answer_tokens"] == expected
    assert [row["verdict_before"] for row in report["answers"]["trained"]] == ["cut"]
    assert f"cut:       1 of 1 answers at {expected} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("iters", "steps"), [(30, range(0, 31, 3)), (3, range(4)), (11, [*range(0, 11, 2), 11])]
)
def test_a_run_has_about_ten_validations(model: str, tmp_path: Path, iters: int, steps: Any) -> None:
    report = train(model, write(tmp_path / "data", PLAIN[:2]), "--iters", str(iters), "--num-questions", "0")
    assert [step for step, _ in report["validation"]] == [*steps]


def test_the_test_file_is_evaluated_at_the_end(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its rows, as `evaluate` does; without a name it is the data's own."""
    data, run = write_data(tmp_path / "data"), str(tmp_path / "run")
    report = train(model, data, "--test", "--adapter-path", run, "--eval-examples", "1")
    capsys.readouterr()
    evaluated = ["evaluate", "--model", model, "--data", str(data), "--adapter-path", run]
    assert main([*evaluated, "--json", "--blas", "off"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert report["test_loss"] == pytest.approx(result["loss_nats"], rel=1e-6)
    assert report["test_perplexity"] == math.exp(report["test_loss"]) and report["test_examples"] == 6
    (tmp_path / "mine.jsonl").write_text(PLAIN[0])
    assert train(model, data, "--test", str(tmp_path / "mine.jsonl"))["test_examples"] == 1


def test_a_settings_file_may_ask_for_the_test(model: str, tmp_path: Path) -> None:
    data, config = write_data(tmp_path / "data"), tmp_path / "config.yaml"
    for value, count in (("true", 6), ("false", None), (str(data / "test.jsonl"), 6)):
        config.write_text(f"test: {value}\n")
        assert train(model, data, "--config", str(config)).get("test_examples") == count


def test_a_missing_test_file_ends_in_one_sentence(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", PLAIN)
    command = ["train", "--model", model, "--data", str(data), "--adapter-path", str(tmp_path / "run")]
    for flags in (["--test"], ["--test", str(tmp_path / "none.jsonl")]):
        assert main([*command, *TINY, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and ".jsonl" in error
    assert not (tmp_path / "run").exists()


def test_samples_are_shown_every_so_many_steps(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They change nothing of the run."""
    data = write(tmp_path / "data", PLAIN)
    plain = train(model, data, "--iters", "5", "--dropout", "0.5")
    capsys.readouterr()
    sampled = train(model, data, "--iters", "5", "--dropout", "0.5", "--sample-every", "2")
    shown = capsys.readouterr().out
    assert [f"step {step}: question 0" in shown for step in range(1, 6)] == [False, True, False, True, False]
    assert sampled["loss_last"] == plain["loss_last"] and sampled["validation"] == plain["validation"]
