"""A full disk while saving: one sentence names the file, old files are kept, nothing is half-written.

`/dev/full` refuses every byte as a full disk does. A file is written under a temporary name and then renamed;
a temporary name that is a link to `/dev/full` makes that one file impossible to write, by the real code.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.screen.curve import save_loss_curve
from mlx_impl.cli.shell_command import shell_command
from mlx_impl.cli.training import manifest
from mlx_impl.cli.training.answers import Evaluation
from mlx_impl.cli.training.manifest import FILES, Manifest
from mlx_impl.cli.training.run_folder import RunFolder
from mlx_impl.config import LoRAConfig
from mlx_impl.disk import files
from mlx_impl.files.adapters import save_adapter
from mlx_impl.files.formats.hf_config import read_config
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from mlx_impl.run.state import Progress, save_state
from mlx_impl.train import StepRecord
from tests.tiny_folder import write_data, write_folder

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")

LORA = LoRAConfig(rank=2, target_modules=("q_proj",))
RECORD = StepRecord(1, 2.5, 0.5, 1e-3, 5, 20, 0.1, 1000)
TINY_RUN = ["--rank", "2", "--iters", "3", "--batch-size", "4", "--save-every", "1", "--blas", "off"]


def fill_the_disk(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make writes of this one file fail as on a full disk."""
    real = files.open_temporary

    def open_temporary(path: Path) -> Path:
        part = real(path)
        if path == file:
            part.unlink()
            part.symlink_to(FULL)
        return part

    monkeypatch.setattr(files, "open_temporary", open_temporary)


def adapted(folder: Path) -> CausalLM:
    model = CausalLM(read_config(write_folder(folder)))
    add_lora(model, LORA)
    return model


WRITERS: dict[str, Callable[[Path, Path], object]] = {  # (folder of the file, folder of a model)
    "adapter_model.safetensors": lambda folder, model: save_adapter(adapted(model), LORA, folder, "base"),
    "adapter_config.json": lambda folder, model: save_adapter(adapted(model), LORA, folder, "base"),
    "training_state.safetensors": lambda folder, _: save_state(
        folder / "training_state.safetensors", {"a": mx.zeros((1000,))}, Progress(1, [], {})
    ),
    "metrics.jsonl": lambda folder, _: RunFolder(folder).open_metrics([RECORD]),
    "report.json": lambda folder, _: RunFolder(folder).write_json("report.json", {"iters": 3}),
    "report.html": lambda folder, _: RunFolder(folder).write_text("report.html", "<!doctype html>"),
    "before.json": lambda folder, _: RunFolder(folder).save_before(Evaluation(1.0, {})),
    "config.yaml": lambda folder, _: RunFolder(folder).save_config({"iters": 3}),
    "loss.png": lambda folder, _: save_loss_curve([RECORD], [], folder / "loss.png"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_no_temporary_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    manifest.write(folder, Manifest({}, {}, {}, written=[*FILES]))
    (folder / name).write_text("old")
    fill_the_disk(folder / name, monkeypatch)
    with pytest.raises(OSError, match="No space left on device") as caught:
        WRITERS[name](folder, tmp_path / "model")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(folder / name))
    assert (folder / name).read_text() == "old"
    assert [path.name for path in folder.iterdir() if ".part" in path.name] == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model, data = (tmp_path_factory.mktemp(name) for name in ("model", "data"))
    return ["--model", str(write_folder(model)), "--data", str(write_data(data)), *TINY_RUN]


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "metrics.jsonl"])
def test_train_on_a_full_disk_ends_with_one_sentence(
    name: str,
    inputs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whichever file cannot be written; the last test covers the metrics."""
    file = tmp_path / "run" / name
    file.parent.mkdir()
    fill_the_disk(file, monkeypatch)
    assert main(["train", *inputs, "--adapter-path", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"error: {file}: No space left on device",
        f"resume with: {shell_command('train', '--resume', file.parent, '--blas', 'off')}",
    ]
    assert not list(tmp_path.rglob("*.part*"))
    assert not file.exists()


def test_a_run_stopped_by_a_full_disk_resumes_bit_exactly(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second save fails; resumed from the first, it ends with the adapter of an uninterrupted run."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    saved = 0
    save = RunFolder.save

    def second_fails(self: RunFolder, *arguments: object) -> None:
        nonlocal saved
        saved += 1
        if saved == 2:
            with pytest.MonkeyPatch.context() as full:
                fill_the_disk(self.state, full)
                save(self, *arguments)  # type: ignore[arg-type]
        else:
            save(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "save", second_fails)
    assert main(["train", *inputs, "--adapter-path", str(folder)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert main(["train", *inputs, "--resume", str(folder)]) == 0
    assert main(["train", *inputs, "--adapter-path", str(whole)]) == 0
    adapters = [(place / "adapter_model.safetensors").read_bytes() for place in (folder, whole)]
    assert adapters[0] == adapters[1]


def test_a_disk_that_fills_up_under_the_metrics_ends_with_one_sentence(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metrics are appended to, so they have no temporary file."""
    monkeypatch.setattr(RunFolder, "open_metrics", lambda self, kept: FULL.open("w"))
    assert main(["train", *inputs, "--adapter-path", str(tmp_path)]) == 2
    error, resume_hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: ") and error.endswith("No space left on device")
    assert resume_hint == f"resume with: {shell_command('train', '--resume', tmp_path, '--blas', 'off')}"
