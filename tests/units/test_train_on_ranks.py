"""`train --distributed`: the files and the output of several ranks are those of one."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli import train as train_command
from mlx_impl.cli.parser import parse_arguments
from mlx_impl.cli.shell_command import shell_command
from mlx_impl.run.watchdog import RankLost
from tests import ring
from tests.killed_runs import require_same_run
from tests.nightly import mostly_at_night
from tests.tiny_folder import write_data, write_folder

# Six examples, one a micro-batch: windows of three, so that with two or four ranks some are idle.
FLAGS = ["--rank", "2", "--iters", "40", "--batch-size", "1", "--grad-accumulation-steps", "3",
         "--blas", "off", "--save-every", "15", "--steps-per-eval", "20", "--dropout", "0.1",
         "--use-dora"]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("inputs")
    return ["--model", str(write_folder(root / "model")), "--data", str(write_data(root / "data"))]


OTHERS: dict[str, Callable[[Path], Path]] = {
    "--data": lambda path: write_data(path, 7),
    "--model": lambda path: write_folder(path, rope_theta=5000.0),
}


def train(*words: str) -> list[str]:
    return ["mlx_impl", "train", *words]


@pytest.fixture(scope="module")
def alone(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run of one process, and what it printed."""
    run = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", *train(*inputs, *FLAGS, "--adapter-path", str(run))]
    done = subprocess.run(command, cwd=ring.ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return run, done.stdout


def without_measured(text: str) -> list[str]:
    """The lines that do not depend on time and place."""
    measured = ("step ", "run:", "ranks:", "report", "time:", "  ")
    return [line for line in text.splitlines() if not line.startswith(measured)]


@pytest.mark.parametrize("num_ranks", mostly_at_night([2, 4], 1))
def test_ranks_write_and_print_what_one_process_does(
    inputs: list[str], alone: tuple[Path, str], tmp_path: Path, num_ranks: int
) -> None:
    """To the bit: adapter, state, metrics, losses, answers and report. Only rank 0 prints."""
    run = tmp_path / "run"
    words = train(*inputs, *FLAGS, "--distributed", "--adapter-path", str(run))
    first, *others = ring.outputs(ring.start(tmp_path, num_ranks, *words))
    assert first[0] == 0, first[2]
    assert others == [(0, "", "")] * (num_ranks - 1)
    require_same_run(run, alone[0])
    assert without_measured(first[1]) == without_measured(alone[1])
    assert f"ranks:     {num_ranks}, which" in first[1]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hosts.json"}


def require_resumable(run: Path, whole: Path) -> None:
    """One process ends the run, with the bits of the whole one."""
    command = [sys.executable, "-m", *train("--resume", str(run), "--blas", "off")]
    subprocess.run(command, cwd=ring.ROOT, check=True, capture_output=True)
    require_same_run(run, whole)


def wait_for_steps(run: Path) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + ring.SECONDS
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_to_one_rank_stops_all_after_the_same_update(
    inputs: list[str], alone: tuple[Path, str], tmp_path: Path
) -> None:
    """SIGTERM at rank 1. Rank 0 prints how to resume, and one process then ends with the same bits."""
    run = tmp_path / "run"
    words = train(*inputs, *FLAGS, "--distributed", "--adapter-path", str(run))
    ranks = ring.start(tmp_path, 2, *words)
    wait_for_steps(run)
    ranks[1].send_signal(signal.SIGTERM)
    (code, output, error), other = ring.outputs(ranks)
    assert code == 143, error
    assert other == (143, "", "rank 1: stopped by SIGTERM\n")
    assert error.splitlines()[0] == "rank 0: stopped by SIGTERM"
    resume = error.splitlines()[-1].removeprefix("resume with: ")
    assert "mlx.launch -n 2 --backend ring -- " in resume
    assert resume.endswith(f"train --resume {run} --blas off --distributed")
    step = int(output.splitlines()[-1].split(":")[0].removeprefix("step "))
    assert (run / "metrics.jsonl").read_text().count("\n") == step
    require_resumable(run, alone[0])


def test_where_nobody_reads_the_first_rank_any_more_all_stop_and_it_saves(
    inputs: list[str], alone: tuple[Path, str], tmp_path: Path
) -> None:
    """A launcher that is killed closes the pipes of its ranks. One process then ends with the same bits."""
    run = tmp_path / "run"
    words = train(*inputs, *FLAGS, "--distributed", "--adapter-path", str(run))
    ranks = ring.start(tmp_path, 2, *words)
    wait_for_steps(run)
    for pipe in (ranks[0].stdout, ranks[0].stderr):
        assert pipe is not None
        pipe.close()
    (code, *_), other = ring.outputs(ranks)
    assert code == 143 and other == (143, "", "rank 1: stopped by SIGTERM\n")
    _, record = mx.load(str(run / "training_state.safetensors"), return_metadata=True)
    assert json.loads(record["progress"])["step"] == (run / "metrics.jsonl").read_text().count("\n") < 40
    require_resumable(run, alone[0])


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    mostly_at_night(
        [
            ("--data", "", "the training data"),
            ("--model", "", "the model's rope_theta"),
            ("--save-every", "7", "--save-every"),
            ("--seed", "9", "seed"),
        ],
        1,
    ),
)
def test_what_differs_between_the_ranks_is_named(
    inputs: list[str], tmp_path: Path, flag: str, value: str, named: str
) -> None:
    """Before anything is trained or written."""
    run = tmp_path / "run"
    words = train(*inputs, *FLAGS, "--distributed", "--adapter-path", str(run))
    other = value or str(OTHERS[flag](tmp_path / "other"))
    rule = f"all ranks must train alike, and on rank 1 {named} is not rank 0's"
    for rank, done in enumerate(ring.outputs(ring.start_each(tmp_path, [words, [*words, flag, other]]))):
        assert done[0] == 2 and done[2] == f"error: rank {rank}: {rule}\n"
    assert not run.exists()


@pytest.mark.nightly
def test_a_rank_that_is_refused_ends_the_others(inputs: list[str], tmp_path: Path) -> None:
    """For a flag that is checked first too: nobody waits for a rank that never comes."""
    words = train(*inputs, *FLAGS, "--distributed", "--adapter-path", str(tmp_path / "run"))
    first, other = ring.outputs(ring.start_each(tmp_path, [words, [*words, "--batch-size", "0"]]))
    assert first[0] == 1 and "error: rank 0: another rank has ended" in first[2]
    assert (other[0], other[2]) == (2, "error: rank 1: --batch-size must be at least 1, got 0\n")


def test_without_a_launcher_distributed_is_refused(inputs: list[str], tmp_path: Path) -> None:
    """MLX's own `init()` would be one rank, silently."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", *train(*inputs, "--distributed", "--adapter-path", str(run))]
    done = subprocess.run(command, cwd=ring.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: several ranks need a launcher, such as: mlx.launch -n 2 --backend ring"
    )
    assert done.stderr.count("\n") == 1 and not run.exists()


@pytest.mark.parametrize(("words", "in_order"), [([], True), (["--no-ordered-sums"], False)])
def test_sums_are_in_order_unless_a_flag_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, words: list[str], in_order: bool
) -> None:
    given: list[bool] = []

    def join(in_order: bool) -> None:
        given.append(in_order)
        raise RankLost

    monkeypatch.setattr("mlx_impl.run.ranks.join_ranks", join)
    with pytest.raises(RankLost):
        train_command.run(parse_arguments(train("--distributed", *words)[1:]))
    assert given == [in_order]


def test_one_process_says_that_it_adds_up_in_order(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the flag was given or saved by several ranks, whose run one process may resume."""
    words = train(*inputs, *FLAGS, "--iters", "1", "--adapter-path", str(tmp_path / "run"))[1:]
    assert main([*words, "--no-ordered-sums"]) == 0
    said = "ranks:     1, which adds up in order: --no-ordered-sums is for several, with --distributed\n"
    assert said in capsys.readouterr().out


@pytest.mark.nightly
def test_ctrl_c_to_the_children_of_the_launcher_stops_all_and_the_printed_command_resumes(
    inputs: list[str], alone: tuple[Path, str], tmp_path: Path
) -> None:
    """`pkill -INT -P PID`. To the launcher alone the ranks are deaf; that is MLX's."""
    run = tmp_path / "run"
    begin = shell_command(*train(*inputs, *FLAGS, "--distributed", "--adapter-path", str(run))[1:])
    launcher = launched(f"mlx.launch -n 2 --backend ring -- {begin}")
    wait_for_steps(run)
    for rank in psutil.Process(launcher.pid).children():
        rank.send_signal(signal.SIGINT)
    output, error = launcher.communicate(timeout=ring.SECONDS)
    resume = next(line for line in error.splitlines() if line.startswith("resume with: "))
    assert f"           after Ctrl-C {resume}\n" in output
    again = launched(resume.removeprefix("resume with: "))
    assert again.communicate(timeout=ring.SECONDS)[1] == ""
    require_same_run(run, alone[0])


def launched(command: str) -> subprocess.Popen:
    """A command that begins with mlx.launch, on ports that are free."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    launch, *words = shlex.split(command)
    path = [str(Path(sys.executable).with_name("mlx.launch")) if launch == "mlx.launch" else launch]
    return subprocess.Popen(
        [*path, "-p", str(port), *words],
        cwd=ring.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.nightly
def test_sums_in_any_order_train_within_rounding(
    inputs: list[str], alone: tuple[Path, str], tmp_path: Path
) -> None:
    """The losses of the first updates differ in their last digits at most."""
    folder = tmp_path / "run"
    words = train(*inputs, *FLAGS, "--distributed", "--no-ordered-sums", "--adapter-path", str(folder))
    done = ring.outputs(ring.start(tmp_path, 2, *words))
    assert [code for code, _, _ in done] == [0, 0], done
    assert "ranks:     2, which share out the micro-batches of each step, sums in any order" in done[0][1]
    assert "ordered_sums: false" in (folder / "config.yaml").read_text()
    ours, theirs = (
        [json.loads(line)["loss_nats"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder, alone[0])
    )
    np.testing.assert_allclose(ours[:5], theirs[:5], rtol=1e-5)
