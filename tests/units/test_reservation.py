"""The folder of a run: a run removes and overwrites only files that a run wrote."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.shell_command import shell_command
from mlx_impl.cli.training import lock, manifest
from mlx_impl.cli.training.manifest import FILES
from mlx_impl.cli.training.run_folder import RunFolder
from mlx_impl.disk.files import PROCESS_TOKEN
from tests.nightly import mostly_at_night
from tests.tiny_folder import TEMPLATE, write_data, write_folder

TINY_RUN = ["--rank", "2", "--iters", "2", "--batch-size", "4", "--num-questions", "0", "--blas", "off"]
NAMES = (*FILES, "manifest.json", ".mlx_impl.lock", "adapter_model.part.safetensors", "best/photo.jpg")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """With a chat template of the user's own, so that a run has every file that a run may have."""
    model, data, own = (tmp_path_factory.mktemp(name) for name in ("model", "data", "own"))
    (own / "own.jinja").write_text(f"{{# mine #}}{TEMPLATE}")
    given = ["--model", str(write_folder(model)), "--data", str(write_data(data))]
    return [*given, "--chat-template", str(own / "own.jinja")]


@pytest.fixture(scope="module")
def finished(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, unchanged."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *inputs, *TINY_RUN, "--adapter-path", str(run)]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, as `run` in an empty folder."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def train(inputs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The command of a tiny run; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    return ["train", *inputs, *TINY_RUN]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the user's own {name}")
    return contents(folder)


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that must fail with one sentence."""
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_repeating_the_same_command_uses_a_new_folder(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapters", "adapters-2", "adapters-3"):
        assert main(train) == 0
        assert f"run:       {name}\n" in capsys.readouterr().out
        assert (tmp_path / name / "report.json").exists()


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("names", [NAMES, *[(name,) for name in NAMES]], ids=lambda names: names[0])
def test_a_folder_with_the_users_files_is_refused_and_unchanged(
    train: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: tuple[str, ...],
    flags: list[str],
) -> None:
    """Also where they have the names of a run's files; the error suggests a free folder."""
    mine = write(tmp_path / "mine", *names)
    error = refusal([*train, "--adapter-path", "mine", *flags], capsys)
    assert re.search(
        r"mine: must be new or empty, but holds \S+: choose another folder, such as mine-2$", error
    )
    assert contents(tmp_path / "mine") == mine
    assert not (tmp_path / "mine-2").exists()


def test_a_folder_with_only_file_browser_files_counts_as_empty(train: list[str], tmp_path: Path) -> None:
    write(tmp_path / "run", ".DS_Store", "._x", "Thumbs.db")
    assert main([*train, "--adapter-path", "run"]) == 0
    assert (tmp_path / "run" / ".DS_Store").read_text() == "the user's own .DS_Store"


def test_overwrite_replaces_only_the_files_that_the_run_wrote(
    train: list[str], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user's own files in the folder are kept."""
    mine = write(run, "notes.txt", "best/photo.jpg", "more/adapter_model.safetensors")
    error = refusal([*train, "--adapter-path", "run"], capsys)
    assert (
        "run: holds a finished run: replace it with --overwrite, or choose another folder, such as run-2"
        in error
    )
    assert contents(run) == mine
    assert main([*train, "--adapter-path", "run", "--overwrite", "--seed", "5"]) == 0
    new = contents(run)
    assert all(new[n] == mine[n] for n in ("notes.txt", "best/photo.jpg", "more/adapter_model.safetensors"))
    assert new["adapter_model.safetensors"] != mine["adapter_model.safetensors"]
    assert json.loads(new["manifest.json"])["settings"]["seed"] == 5


@pytest.mark.parametrize("name", FILES)
def test_a_file_changed_after_the_run_is_not_overwritten(
    train: list[str], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (run / name).write_bytes((run / name).read_bytes() + b" ")
    before = contents(run)
    error = refusal([*train, "--adapter-path", "run", "--overwrite"], capsys)
    assert f"run/{name}: was changed after the run wrote it, and is not overwritten: choose another" in error
    assert contents(run) == before


@pytest.mark.parametrize("name", ["loss.png", "best", "best/adapter_model.safetensors"])
def test_overwrite_removes_nothing_through_a_link(
    train: list[str], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The file or folder was moved elsewhere and replaced by a link."""
    elsewhere = tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = contents(tmp_path)
    assert "was changed after the run wrote it" in refusal(
        [*train, "--adapter-path", "run", "--overwrite"], capsys
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "train.jsonl"])
def test_a_model_or_data_folder_cannot_hold_a_run(
    train: list[str], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """transformers would load an adapter in a model's folder automatically."""
    before = write(tmp_path / "run", name)
    error = refusal([*train, "--adapter-path", "run", "--overwrite"], capsys)
    assert f"run/{name}: a " in error and "folder must not hold a run: choose another folder" in error
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("place", ["link", "link/run", "link/a/b"])
@pytest.mark.parametrize("what", ["model", "data", "adapter"])
def test_a_run_cannot_start_inside_its_inputs(
    inputs: list[str],
    train: list[str],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    place: str,
) -> None:
    """Neither in the folder of an input, nor deeper inside, nor through a link."""
    (tmp_path / "link").symlink_to({"model": Path(inputs[1]), "data": Path(inputs[3]), "adapter": run}[what])
    before = contents(tmp_path) | contents(tmp_path / "link")
    command = ["train", *inputs, "--iters", "1", "--blas", "off", "--init-adapter", str(run)]
    assert "another" in refusal([*command, "--adapter-path", place], capsys)
    assert contents(tmp_path) | contents(tmp_path / "link") == before


def test_a_run_cannot_replace_the_run_that_it_starts_from(
    inputs: list[str], train: list[str], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither with its last adapter, nor its best, nor its settings."""
    before = contents(tmp_path)
    common = ["train", *inputs, "--iters", "2", "--blas", "off", "--adapter-path", "run", "--overwrite"]
    for flags in (["--init-adapter", "run"], ["--init-adapter", "run/best"], ["--config", "run/config.yaml"]):
        assert "must not be, contain or lie inside the" in refusal([*common, *flags], capsys)
    assert contents(tmp_path) == before


def test_two_processes_cannot_share_a_folder(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the other process; without --adapter-path the next folder is used."""
    run = tmp_path / "adapters"
    who = r"is using this folder"
    with lock.locked(run):
        before = contents(run)
        error = refusal([*train, "--adapter-path", "adapters"], capsys)
        assert re.search(rf"adapters: process \d+ on {re.escape(socket.gethostname())} {who}", error)
        assert contents(run) == before
        assert main(train) == 0
    assert not run.exists() and (tmp_path / "adapters-2").exists()


def test_a_run_in_progress_cannot_be_resumed(
    train: list[str], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"finished": None}))
    with lock.locked(tmp_path / "run"):
        assert "is using this folder" in refusal(["train", "--resume", "run", "--blas", "off"], capsys)
        assert "is using this folder" in refusal([*train, "--adapter-path", "run"], capsys)
    assert main(["train", "--resume", "run", "--blas", "off"]) == 0


def test_after_a_crash_the_lock_is_free_and_temporary_files_are_removed(
    train: list[str], tmp_path: Path
) -> None:
    """Only the temporary files of the process that crashed are removed."""
    run = tmp_path / "run"
    code = f"""
import os, sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from pathlib import Path
from mlx_impl.cli.training.lock import locked
from mlx_impl.disk.files import atomic_write
with locked(Path("run")), atomic_write(Path("run/manifest.json")) as part:
    part.write_text("half"); print(part.name, flush=True); os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == -9 and (run / done.stdout.strip()).exists(), done.stderr
    assert main([*train, "--adapter-path", "run"]) == 0
    assert not (run / done.stdout.strip()).exists()
    assert not list(run.glob(f".*{PROCESS_TOKEN}*")) and not (run / lock.NAME).exists()


def test_a_file_that_is_no_lock_is_not_read_as_one(tmp_path: Path) -> None:
    """A link, a folder and a user's text file."""
    link, folder, text = (tmp_path / name for name in "abc")
    link.symlink_to(tmp_path / "nowhere")
    folder.mkdir()
    text.write_text("mine")
    assert [lock.read(path) for path in (link, folder, text)] == [None] * 3


def test_locking_does_not_overwrite_a_users_file(
    train: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a text file of that name, nor a lock file that has a second hard link."""
    precious = tmp_path / "precious"
    for content in ("mine", '{"host": "h", "process": 1, "parts": "0123456789abcdef"}'):
        precious.write_text(content)
        os.link(precious, run / lock.NAME)
        error = refusal([*train, "--adapter-path", "run", "--overwrite"], capsys)
        assert "was changed after" in error or "must be a lock file, but is another file" in error
        assert precious.read_text() == content
        (run / lock.NAME).unlink()


def test_a_lock_file_removed_before_locking_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, its last holder removes the file; another process may make a new one."""
    real, calls = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / lock.NAME).unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / lock.NAME).exists()
        with pytest.raises(lock.InUse), lock.locked(tmp_path):
            pass


def test_a_run_whose_folder_was_moved_writes_into_no_other_folder(
    train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last save is in the moved folder, from which it can be resumed."""
    real = RunFolder.save

    def save(self: RunFolder, *rest: Any) -> None:
        real(self, *rest)
        if not (tmp_path / "moved").exists():
            (tmp_path / "run").rename(tmp_path / "moved")
            write(tmp_path / "run", "adapter_model.safetensors", lock.NAME)

    monkeypatch.setattr(RunFolder, "save", save)
    capsys.readouterr()
    assert main([*train, "--adapter-path", "run", "--save-every", "1"]) == 2
    assert "run: was moved away or replaced while this process used it" in capsys.readouterr().err
    assert contents(tmp_path / "run") == {
        name: f"the user's own {name}".encode() for name in (lock.NAME, "adapter_model.safetensors")
    }
    (tmp_path / "moved" / lock.NAME).unlink(missing_ok=True)
    assert main(["train", "--resume", "moved", "--blas", "off"]) == 0


@pytest.mark.parametrize("name", ["report.json", "loss.png"])
@pytest.mark.parametrize("kind", mostly_at_night(["file", "folder"], 1))
def test_resume_does_not_overwrite_a_file_added_to_the_run(
    train: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    kind: str,
) -> None:
    """The error comes before any training."""
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_curve", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert main([*train, "--adapter-path", "run"]) == 143
    write(tmp_path / "run", name if kind == "file" else f"{name}/x")
    before = contents(tmp_path)
    error = refusal(["train", "--resume", "run", "--blas", "off"], capsys)
    assert f"run/{name}: was not written by the run in this folder: move it away" in error
    assert contents(tmp_path) == before
    (tmp_path / "run" / name).rename(tmp_path / "mine")
    assert main(["train", "--resume", "run", "--blas", "off"]) == 0


def test_a_file_changed_between_kill_and_resume_is_kept(run: Path) -> None:
    """The new run has started, and the old one is not yet removed."""
    old = manifest.read(run)
    manifest.write(run, replace(old, finished=None, to_remove=old.finished or {}, written=[]))
    (run / "loss.png").write_text("mine")
    manifest.remove_previous_run(run)
    assert set(contents(run)) == {"loss.png", "manifest.json"}
    with pytest.raises(ValueError, match=r"loss\.png: was not written by the run in this folder"):
        manifest.require_own_files(run)


def test_a_run_cannot_be_replaced_while_the_initial_adapter_links_into_it(
    inputs: list[str], train: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).symlink_to(run / "best" / name)
    before = contents(run)
    command = ["train", *inputs, "--iters", "1", "--blas", "off", "--init-adapter", "adapter"]
    error = refusal([*command, "--adapter-path", "run", "--overwrite"], capsys)
    assert "must not be, contain or lie inside the initial adapter's file adapter_" in error
    assert contents(run) == before


@pytest.mark.parametrize("name", ["-q", "nodir/../run", "a b"])
def test_the_resume_command_works_for_any_folder_name(
    train: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_curve", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert main([*train, f"--adapter-path={name}"]) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert main(shlex.split(last.removeprefix(f"resume with: {shell_command()} "))) == 0


def test_a_folder_name_with_control_characters_is_refused(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal([*train, "--adapter-path", "a\x1b[2J"], capsys)
    assert r"--adapter-path must be a printable path, got 'a\x1b[2J'" in error
    assert not (tmp_path / "a\x1b[2J").exists()


def test_removing_the_metrics_during_a_run_is_an_error(
    train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = RunFolder.save_best

    def save_best(self: RunFolder, *rest: object) -> None:
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        real(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "save_best", save_best)
    assert main([*train, "--adapter-path", "run", "--learning-rate", "0.01"]) == 2
    error = capsys.readouterr().err
    assert "run/metrics.jsonl: was removed or replaced during the run" in error


def test_a_run_that_never_started_leaves_no_folder(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the folder nor its parents, unless they existed before."""
    refusal([*train, "--adapter-path", "a/b/c", "--rank", "1000"], capsys)
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    refusal([*train, "--adapter-path", "empty", "--rank", "1000"], capsys)
    assert list((tmp_path / "empty").iterdir()) == []
