"""However a run is stopped, it is saved, and the last line is the command to resume it."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.shell_command import shell_command
from mlx_impl.cli.training import finetune
from mlx_impl.cli.training.run_folder import RunFolder
from tests.nightly import mostly_at_night
from tests.tiny_folder import write_data, write_folder

RESUME = f"resume with: {shell_command()} "
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model, data = (tmp_path_factory.mktemp(name) for name in ("model", "data"))
    common = ["--model", str(write_folder(model)), "--data", str(write_data(data))]
    return [*common, "--rank", "2", "--iters", "1000000", "--blas", "off"]


def command(inputs: list[str], run: Path) -> list[str]:
    return [sys.executable, "-m", "mlx_impl", "train", *inputs, "--adapter-path", str(run)]


def wait_for_steps(run: Path, process: subprocess.Popen[str]) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def assert_saved(run: Path) -> None:
    """The training state has every step of the metrics, and the metrics have only whole lines."""
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    _, metadata = mx.load(str(run / "training_state.safetensors"), return_metadata=True)
    assert json.loads(metadata["progress"])["step"] == len(steps)


@pytest.mark.parametrize(
    "number", mostly_at_night(SIGNALS, 1), ids=lambda number: signal.Signals(number).name
)
def test_a_signal_saves_the_run_and_prints_the_resume_command(
    inputs: list[str], tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        command(inputs, run), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for_steps(run, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == SIGNALS[signal.Signals(number)], output
    assert "saved in" in output and "Traceback" not in output
    assert_saved(run)
    assert output.splitlines()[-2:] == [
        f"stopped by {signal.Signals(number).name}",
        f"{RESUME}train --resume {run} --blas off",
    ]


def test_closing_the_terminal_loses_no_step(inputs: list[str], tmp_path: Path) -> None:
    """The process gets SIGHUP and can no longer print."""
    run = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(sys.executable, command(inputs, run))
    deadline = time.monotonic() + 100
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert_saved(run)


@pytest.mark.nightly
def test_closing_the_output_pipe_loses_no_step(inputs: list[str], tmp_path: Path) -> None:
    """`train | head`: the resume command is on standard error."""
    run = tmp_path / "run"
    with subprocess.Popen(
        command(inputs, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        wait_for_steps(run, process)
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 141
    assert_saved(run)
    assert error == f"{RESUME}train --resume {run} --blas off\n"


@pytest.mark.nightly
def test_nohup_is_respected(inputs: list[str], tmp_path: Path) -> None:
    """A SIGHUP that is ignored when the program starts stays ignored."""
    run = tmp_path / "run"
    arguments = ["nohup", *command(inputs, run)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for_steps(run, process)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_run_stopped_before_its_first_save_says_start_again(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder does not exist, as before."""
    run = tmp_path / "run"
    monkeypatch.setattr(finetune, "evaluate_model", lambda *_: signal.raise_signal(signal.SIGTERM))
    arguments = ["train", *inputs, "--adapter-path", str(run)]
    assert main(arguments) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"start again with: {shell_command(*arguments)}"
    assert not run.exists()


def test_a_full_disk_ends_with_the_resume_command(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "some file")

    monkeypatch.setattr(RunFolder, "save", full)
    run = tmp_path / "a run"
    assert main(["train", *inputs, "--iters", "1", "--adapter-path", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error == [
        "error: some file: No space left on device",
        f"{RESUME}train --resume '{run}' --blas off",
    ]
    monkeypatch.undo()
    assert main(shlex.split(error[1].removeprefix(RESUME))) == 0
    assert (run / "report.json").exists()
