"""`--eval-examples`: the losses are computed over a few examples, and progress is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mlx_impl.__main__ import main
from mlx_impl.cli.screen import console
from mlx_impl.cli.training.samples import evenly_spaced
from mlx_impl.data import Example
from tests.tiny_folder import write_data, write_folder

FLAGS = ["--rank", "2", "--iters", "1", "--num-questions", "0", "--blas", "off", "--json"]


def examples(count: int) -> list[Example]:
    return [Example((number,), (True,)) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [(10, 3, [0, 3, 6]), (10, 1, [0]), (7, 5, [0, 1, 2, 4, 5]), (3, 5, [0, 1, 2]), (3, -1, [0, 1, 2])],
)
def test_the_chosen_examples_are_evenly_spaced(count: int, most: int, chosen: list[int]) -> None:
    assert [example.tokens[0] for example in evenly_spaced(examples(count), most)] == chosen


def test_the_losses_are_those_of_the_chosen_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both training and validation losses; the report has the numbers of examples."""
    model, data = write_folder(tmp_path / "model"), write_data(tmp_path / "data")
    few = tmp_path / "few"
    few.mkdir()
    lines = (data / "train.jsonl").read_text().splitlines()
    for name in ("train", "valid"):
        (few / f"{name}.jsonl").write_text("\n".join([lines[0], lines[3]]) + "\n")
    reports = []
    for folder, most in ((data, "2"), (few, "-1")):
        flags = ["--adapter-path", str(tmp_path / f"run{most}"), "--eval-examples", most]
        assert main(["train", "--model", str(model), "--data", str(folder), *FLAGS, *flags]) == 0
        printed = capsys.readouterr()
        reports.append(json.loads(printed.out))
        assert ("over 2 of 6 training examples" in printed.err) == (most == "2")
    assert reports[0]["loss_first"] == reports[1]["loss_first"]
    assert reports[0]["valid_loss_first"] == reports[1]["valid_loss_first"]
    sizes = ("train_examples", "train_examples_evaluated", "valid_examples", "valid_examples_evaluated")
    assert [reports[0][name] for name in sizes] == [6, 2, 6, 2]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_the_time_left(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar on a terminal, otherwise a line from time to time."""
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    written = io.StringIO()
    shown = Console(file=written, force_terminal=is_terminal, width=80)
    assert list(console.show_progress(range(4), 4, "evaluating", shown)) == [0, 1, 2, 3]
    text = written.getvalue()
    if is_terminal:
        assert "evaluating" in text and "100%" in text and "0:00:0" in text
    else:
        assert [line.split(",")[0] for line in text.splitlines()] == [
            f"evaluating: {n} of 4" for n in (1, 2, 3)
        ]
        assert text.count("s left") == 3
