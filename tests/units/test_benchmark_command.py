"""`python -m benchmarks` refuses wrong arguments in one line, before it measures anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

import benchmarks.__main__ as command
from benchmarks.cases import CASES
from benchmarks.contestants import Entry
from benchmarks.contestants.ours import Ours
from benchmarks.inputs import read_inputs
from mlx_impl.lora import DoRALinear, lora_layers

REFUSED = {
    "--steps 0": "--steps must be 1 or more, got 0",
    "--steps -1": "--steps must be 1 or more, got -1",
    "--only mlx-lm": "--only must begin with ours, got 'mlx-lm'",
    "--only ours,ours": "--only must name each trainer once, got 'ours,ours'",
    "--write --case small": "--write accepts only the case smollm2 with all its trainers",
    "--write --only ours": "--write accepts only the case smollm2 with all its trainers",
    "--as-installed --steps 5": "--as-installed measures two steps of ours and mlx-lm: no --steps, no --only",
    "--as-installed --only ours": "--as-installed measures two steps of ours and mlx-lm: no --steps",
    "curves --steps 3": "curves takes no --steps",
    "curves --case small": "curves takes no --case",
    "memory --json": "memory takes no --json",
    "memory --only ours": "memory takes no --only",
    "memory --as-installed": "memory takes no --as-installed",
}


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any) -> Any:
        pytest.fail("something was measured")

    for name in ("measure", "measure_as_installed", "measure_curve", "call"):
        monkeypatch.setattr(command, name, measured)


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("line", REFUSED)
def test_a_flag_that_would_be_ignored_or_mislead_is_refused(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(line.split())
    assert exit_.value.code == 2
    assert REFUSED[line] in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("what", ["table", "curves", "memory"])
def test_a_readme_with_uncommitted_changes_is_not_rewritten(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("theirs")
    monkeypatch.setattr(command, "README", tmp_path / "README.md")
    assert command.main([what, "--write"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'README.md'}: git cannot say")


def test_a_case_for_a_gpu_needs_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "call", lambda function: False)
    assert command.main(["--case", "tinyllama"]) == 2
    assert "the case tinyllama needs a GPU, and MLX has none here" in capsys.readouterr().err


def test_only_mlx_trainers_run_a_case_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "is_installed", True)
    case = CASES["tiny"]
    assert command.contestants(case, "ours,mlx-lm,peft") == ["ours", "mlx-lm", "peft"]
    assert command.contestants(replace(case, bits=4), "ours,mlx-lm,peft") == ["ours", "mlx-lm"]


@pytest.mark.usefixtures("on_the_cpu")
def test_a_case_says_of_what_kind_base_and_adapter_are() -> None:
    case = replace(CASES["tiny"], bits=4, dropout=0.5, use_dora=True)
    ours = Ours(read_inputs(case), case)
    layers = lora_layers(ours.model).values()
    assert {(type(layer), type(layer.linear), layer.dropout.p) for layer in layers} == {
        (DoRALinear, nn.QuantizedLinear, 0.5)
    }
