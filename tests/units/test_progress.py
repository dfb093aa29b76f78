"""What takes seconds shows how far it is: encoding, by example, and fusing, by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.screen import console
from mlx_impl.cli.screen.console import StatusLine, how_far, make_console
from tests.nightly import mostly_at_night
from tests.tiny_folder import write_data, write_folder
from tests.units.test_fusing import write_adapter


def test_training_tells_how_many_examples_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    model, data = write_folder(tmp_path / "model"), write_data(tmp_path / "data")
    arguments = ["--model", str(model), "--data", str(data), "--adapter-path", str(tmp_path / "run")]
    assert main(["train", *arguments, "--iters", "1", "--num-questions", "0", "--blas", "off"]) == 0
    printed = capsys.readouterr().out
    assert "encoding training examples: 5 of 6, 0 s left" in printed
    assert "encoding validation examples: 5 of 6, 0 s left" in printed


@pytest.mark.parametrize("flag", mostly_at_night(["--gguf", "--save-path"], 1))
def test_fuse_tells_how_many_tensors_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """The tiny model has 2 * 9 + 3 tensors."""
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    base = write_folder(tmp_path / "base")
    adapter, path = write_adapter(base, tmp_path / "adapter"), tmp_path / "x.gguf"
    arguments = ["--model", str(base), "--adapter-path", str(adapter), flag, str(path), "--blas", "off"]
    assert main(["fuse", *arguments]) == 0
    assert "writing tensors: 20 of 21, " in capsys.readouterr().err


def test_a_terminal_sees_the_count_beside_the_spinner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REFRESH_SECONDS", 0.0)
    screen, seen = make_console(stderr=True, quiet=True), list[str]()
    status = screen.status("")
    monkeypatch.setattr(status, "update", seen.append)
    screen.is_interactive = True
    assert list(StatusLine(status, screen).count("encoding")(range(3))) == [0, 1, 2]
    assert [text.split(",")[0] for text in seen] == [f"encoding: {done} of 3" for done in range(3)]


def test_the_time_left_follows_from_the_time_so_far() -> None:
    assert how_far("encoding", 1_000, 4_000, 5.0) == "encoding: 1,000 of 4,000, 15 s left"
