"""Output: colours and progress bars on a terminal, plain lines elsewhere, one object with --json."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from mlx_impl.cli.screen.console import printable
from tests.nightly import mostly_at_night
from tests.tiny_folder import write_data, write_folder

ESCAPES = re.compile(r"\x1b\[[0-9;?]*([a-zA-Z])")


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = write_folder(tmp_path_factory.mktemp("model"))
    data = write_data(tmp_path_factory.mktemp("data"))
    return ["--model", str(model), "--data", str(data), "--blas", "off"]


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """Everything that the program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    known = {**plain, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40", **environment}
    command = [sys.executable, "-m", "mlx_impl", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=known) as process:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 65536):
                written += chunk
        except OSError:  # on Linux, once the other side is closed
            pass
        finally:
            os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


def movements(written: str) -> set[str]:
    """The final letters of all escape sequences; m is for colours."""
    return set(ESCAPES.findall(written))


def train(common: list[str], folder: Path, *flags: str) -> list[str]:
    return ["train", *common, "--adapter-path", str(folder), "--rank", "2", "--iters", "12", *flags]


@pytest.mark.parametrize("command", mostly_at_night(["inspect", "train"], 1))
def test_a_closed_output_pipe_ends_the_command_silently_with_141(
    common: list[str], tmp_path: Path, command: str
) -> None:
    """As with `| head`."""
    model_and_data = common[: common.index("--blas")]  # inspect multiplies no matrices
    arguments = train(common, tmp_path / "run") if command == "train" else [command, *model_and_data]
    whole = [sys.executable, "-m", "mlx_impl", *arguments]
    with subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        if command == "train":
            assert (
                process.stdout.readline()
            )  # the line about the BLAS, which is printed before the console exists
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 141
    assert b"rror" not in error and b"Broken" not in error


def test_a_terminal_gets_a_progress_bar_and_colours(common: list[str], tmp_path: Path) -> None:
    written = on_a_terminal(train(common, tmp_path / "run"))
    assert "12/12" in written and movements(written) > {"m", "K"}
    lines = ESCAPES.sub("", written).replace("\r", "\n").splitlines()
    # Lines with paths are not wrapped, so that the paths can be copied.
    unwrapped = ("BLAS", "run:", "data:", "step 12: adapter", "report.json", "  ")
    assert max(cell_len(line) for line in lines if not line.startswith(unwrapped)) <= 80


@pytest.mark.nightly
def test_no_color_removes_colours_and_keeps_the_bar(common: list[str], tmp_path: Path) -> None:
    written = on_a_terminal(train(common, tmp_path / "run"), NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", written) and "K" in movements(written)


@pytest.mark.nightly
def test_a_dumb_terminal_gets_plain_lines(common: list[str], tmp_path: Path) -> None:
    written = on_a_terminal(train(common, tmp_path / "run"), TERM="dumb")
    assert movements(written) == set() and "step 10/12" in written


def test_a_file_gets_plain_lines(common: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_impl", *train(common, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert "step 10/12" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("command", mostly_at_night(["evaluate", "generate", "train"], 2))
def test_json_prints_one_object_and_nothing_else(common: list[str], tmp_path: Path, command: str) -> None:
    model = [*common[:2], *common[4:]]
    arguments = {
        "train": train(common, tmp_path / "run", "--json"),
        "evaluate": ["evaluate", *common, "--json"],
        "generate": ["generate", *model, "--prompt", "Hi", "--max-tokens", "3", "--json"],
    }
    run = [sys.executable, "-m", "mlx_impl", *arguments[command]]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert isinstance(json.loads(done.stdout), dict) and done.stdout.count("\n") == 1


def test_an_answer_cannot_move_the_cursor() -> None:
    """Nor clear the screen or ring the bell; line breaks, tabs and joined emoji are kept."""
    assert printable("a\x1b[2J\x07\r\x9b1m") == "a\ufffd[2J\ufffd\ufffd\ufffd1m"
    assert printable("é\n\t👩\u200d🔬") == "é\n\t👩\u200d🔬"


def test_generate_on_a_terminal_prints_the_answer(common: list[str]) -> None:
    """The answer follows only output that has been erased again, such as the spinner."""
    model = [*common[:2], *common[4:]]
    arguments = ["generate", *model, "--prompt", "Hi", "--max-tokens", "3"]
    plain = subprocess.run([sys.executable, "-m", "mlx_impl", *arguments], capture_output=True, timeout=120)
    written = on_a_terminal(arguments).replace("\r\n", "\n")
    expected = printable(plain.stdout.decode()) + plain.stderr.decode().splitlines(keepends=True)[-1]
    assert ESCAPES.sub("", written).endswith(expected) and "cut after 3 tokens" in expected
