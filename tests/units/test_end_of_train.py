"""What `train` tells at its end, for every kind of data: answers, losses, the best step, next commands."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_impl import read_conversations
from mlx_impl.__main__ import main
from mlx_impl.cli.parser import parse_arguments
from mlx_impl.cli.shell_command import shell_command
from mlx_impl.cli.training.answers import Answer, reply_text
from mlx_impl.cli.training.job import steps_per_eval
from mlx_impl.cli.training.samples import choose_samples, longest_reply
from mlx_impl.files.checkpoint import load_tokenizer
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


@pytest.fixture(scope="module")
def ended(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A finished run whose rows name no answers: its folder, its report and what it printed."""
    root, printed = tmp_path_factory.mktemp("ended"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        report = train(model, write(root / "my data", PLAIN), "--adapter-path", str(root / "my run"))
    return root / "my run", report, printed.getvalue()


def test_data_without_answers_has_samples_before_and_after(ended: tuple[Path, dict[str, Any], str]) -> None:
    _, report, shown = ended
    samples = report["answers"]["sample"]
    assert [row["question"] for row in samples] == ["question 0", "question 2", "question 5"]
    assert [row["reply"] for row in samples] == ["reply 0", "reply 2", "reply 5"]
    assert all({"before", "after"} <= row.keys() and row["expected"] is None for row in samples)
    assert {row["verdict_after"] for row in samples} <= {"", "cut"}
    assert "sample_before" not in report
    assert "sample: question" in shown and "right" not in shown


def samples_of(model: str, rows: list[str], tmp_path: Path, max_tokens: int = 100) -> list[tuple[str, str]]:
    """The questions, and the data's replies."""
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    chosen = choose_samples(load_tokenizer(model), read_conversations(tmp_path / "rows.jsonl"), max_tokens)
    return [(sample.question, reply_text(sample)) for sample in chosen]


def test_every_kind_of_row_can_be_a_sample(model: str, tmp_path: Path) -> None:
    """A text is cut in the middle, between two words."""
    assert samples_of(model, PAIRS, tmp_path)[0] == ("question 0", "reply 0")
    assert samples_of(model, TEXTS, tmp_path)[0] == ("some words of text", " number 0, and more of them")


def test_a_row_that_cannot_be_asked_is_no_sample(model: str, tmp_path: Path) -> None:
    """A text of one word, and a prompt that is too long."""
    rows = [json.dumps({"text": "word"}), conversation_line("x" * 300, "y"), conversation_line("x", "z")]
    assert samples_of(model, rows, tmp_path) == [("x", "z")]


def test_the_report_has_loss_and_perplexity_on_held_out_rows(
    ended: tuple[Path, dict[str, Any], str],
) -> None:
    _, report, shown = ended
    for when in ("first", "last", "best"):
        assert report[f"valid_perplexity_{when}"] == pytest.approx(math.exp(report[f"valid_loss_{when}"]))
    steps, losses = zip(*report["validation"], strict=True)
    assert report["valid_loss_best"] == min(losses)
    assert report["valid_best_step"] == steps[losses.index(min(losses))]
    first, last = (f"{report[f'valid_loss_{when}']:.3f}" for when in ("first", "last"))
    assert f"held-out:  loss {first} -> {last}, perplexity" in shown
    assert f"(best: step {report['valid_best_step']})" in shown


def test_without_held_out_rows_it_says_so(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the samples are rows of the training data."""
    report = train(model, write(tmp_path / "data", PLAIN, "train"))
    assert report["valid_perplexity_last"] is None and report["validation"] == []
    assert report["answers"]["sample"][0]["question"] == "question 0"
    assert "held-out:  none: with valid.jsonl" in capsys.readouterr().out


def test_the_next_commands_run_as_they_are_printed(
    ended: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where names have spaces. The repeated run ends with the same loss."""
    run, report, shown = ended
    lines = shown.partition("\nnext:\n")[2].splitlines()
    commands = [
        shlex.split(line.strip().removeprefix(shell_command())) for line in lines if "  #" not in line
    ]
    assert [words[0] for words in commands] == ["generate", "generate", "fuse", "train"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))  # of the chat
    for words in commands:
        assert main(words) == 0, words
    again = json.loads((run.with_name("my run-2") / "report.json").read_text())
    assert again["loss_last"] == report["loss_last"]


def test_an_answer_that_was_cut_is_cut_and_not_wrong() -> None:
    assert Answer("?", "yes", "well, I think", is_cut=True).verdict == "cut"
    assert Answer("?", "yes", "well, yes, I", is_cut=True).verdict == "right"
    assert Answer("?", "yes", "no").verdict == "wrong"
    assert Answer("?", None, "no").verdict == ""


LONG = [conversation_line("a", "yes", answer="yes"), conversation_line("b", "x" * 60)]


def test_an_answer_has_as_many_tokens_as_the_longest_reply_of_the_file(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 letters, a token each, and the end of the turn; the row of that reply names no answer."""
    report = train(model, write(tmp_path / "data", LONG))
    assert report["max_answer_tokens"] == 61
    assert [row["verdict_before"] for row in report["answers"]["trained"]] == ["cut"]
    assert "cut:       1 of 1 answers at 61 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["x" * 60, "y", ""])
def test_the_longest_reply_is_counted_in_tokens_with_its_end(model: str, tmp_path: Path, text: str) -> None:
    write(tmp_path / "data", [conversation_line("a", ""), conversation_line("b", text)])
    rows = read_conversations(tmp_path / "data" / "train.jsonl")
    assert longest_reply(load_tokenizer(model), rows, "require") == len(text) + 1


@pytest.mark.parametrize(("iters", "steps"), [(30, 3), (3, 1), (11, 2), (1000, 100), (36, 4)])
def test_a_run_has_about_ten_validations(iters: int, steps: int) -> None:
    job: Any = SimpleNamespace(steps_per_eval=None)
    assert steps_per_eval(job, iters) == steps


def test_the_test_file_is_evaluated_at_the_end(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its rows, as `evaluate` does; without a name it is the data's own."""
    data, run = write_data(tmp_path / "data"), str(tmp_path / "run")
    flags = ["--adapter-path", run, "--eval-examples", "1", "--iters", "11", "--max-answer-tokens", "7"]
    report = train(model, data, "--test", *flags)
    assert [step for step, _ in report["validation"]] == [*range(0, 11, 2), 11]
    assert report["max_answer_tokens"] == 7
    capsys.readouterr()
    evaluated = ["evaluate", "--model", model, "--data", str(data), "--adapter-path", run]
    assert main([*evaluated, "--json", "--blas", "off"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert report["test_loss"] == pytest.approx(result["loss_nats"], rel=1e-6)
    assert report["test_perplexity"] == math.exp(report["test_loss"]) and report["test_examples"] == 6
    (tmp_path / "mine.jsonl").write_text(PLAIN[0])
    assert train(model, data, "--test", str(tmp_path / "mine.jsonl"))["test_examples"] == 1


@pytest.mark.parametrize(("value", "given"), [("true", True), ("false", None), ("a.jsonl", Path("a.jsonl"))])
def test_a_settings_file_may_ask_for_the_test(tmp_path: Path, value: str, given: object) -> None:
    (tmp_path / "config.yaml").write_text(f"test: {value}\n")
    assert parse_arguments(["train", "--config", str(tmp_path / "config.yaml")]).test == given


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
