"""`train --resume`: a stopped run resumes bit-exactly, or one sentence says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.__main__ import main
from mlx_impl.data import Example
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.train import StepRecord
from tests.nightly import mostly_at_night
from tests.tiny_folder import conversation_line, write_data, write_folder

# Eight updates; validated after 3, 6 and 8, saved after 2, 4, 6 and 8.
SETTINGS = ["--rank", "2", "--dropout", "0.2", "--epochs", "4", "--batch-size", "2",
            "--lr-schedule", "cosine", "--grad-accumulation-steps", "2", "--warmup-steps", "2",
            "--max-grad-norm", "1", "--use-dora", "--steps-per-eval", "3", "--save-every", "2",
            "--blas", "off"]  # fmt: skip
MEASURED = {"step_seconds_median", "training_seconds", "peak_bytes", "run"}


INTERRUPTED = 128 + signal.SIGINT


class Killed(BaseException):
    """Like a power cut: no handler runs on the way out."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ["train", "--model", model, "--data", str(write_data(folder / "data")), *SETTINGS]
    assert main([*arguments, "--adapter-path", str(folder / "run")]) == 0
    return folder / "run"


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    """Kill the run after this step, or press Ctrl-C in this step."""
    real_fit = LoRATrainer.fit

    def fit(self: LoRATrainer, examples: list[Example]) -> Iterator[StepRecord]:
        for record in real_fit(self, examples):
            if record.step == step and not killed:
                signal.raise_signal(signal.SIGINT)
            yield record
            if record.step == step and killed:
                raise Killed

    monkeypatch.setattr(LoRATrainer, "fit", fit)


def stopped_run(model: str, data: Path, folder: Path, step: int, killed: bool = False) -> list[str]:
    """Start a run and stop it; returns its command without the folder."""
    command = ["train", "--model", model, "--data", str(data), *SETTINGS]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(step, patch, killed)
        if killed:
            with pytest.raises(Killed):
                main([*command, "--adapter-path", str(folder)])
        else:
            assert main([*command, "--adapter-path", str(folder)]) == INTERRUPTED
    return command


def contents(path: Path) -> tuple[dict[str, bytes], object]:
    arrays, metadata = mx.load(str(path), return_metadata=True)
    return {name: bytes(np.array(array)) for name, array in arrays.items()}, metadata


def assert_same_run(part: Path, whole: Path) -> None:
    """Metrics, adapters, training state and report are equal, except times and memory."""
    rows = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (part, whole)]
    clocks = {"seconds", "peak_bytes"}
    ours, theirs = (
        [{k: v for k, v in json.loads(row).items() if k not in clocks} for row in run] for run in rows
    )
    assert ours == theirs
    for name in ("adapter_model", "training_state", "best/adapter_model"):
        assert contents(part / f"{name}.safetensors") == contents(whole / f"{name}.safetensors"), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (part, whole)]
    assert {k: v for k, v in reports[0].items() if k not in MEASURED} == {
        k: v for k, v in reports[1].items() if k not in MEASURED
    }


@pytest.mark.parametrize(
    "step",
    mostly_at_night([5, 4, 3, 8], 1),
    ids=["between", "when it saves", "when it validates", "at the end"],
)
def test_a_run_stopped_by_ctrl_c_resumes_bit_exactly(
    model: str, data: Path, whole: Path, run: Path, step: int
) -> None:
    stopped_run(model, data, run, step)
    assert main(["train", "--resume", str(run), "--blas", "off"]) == 0
    assert_same_run(run, whole)


FLAGS = [["--seed", "0", "--save-every", "1"], ["--epochs", "4"], ["--iters", "8"]]


@pytest.mark.parametrize("flags", mostly_at_night(FLAGS, 1))
def test_resume_accepts_flags_that_repeat_the_runs_settings(
    model: str, data: Path, whole: Path, run: Path, flags: list[str]
) -> None:
    """Spelled as in the run or differently; --save-every may even change."""
    stopped_run(model, data, run, 3)
    assert main(["train", "--resume", str(run), "--blas", "off", *flags]) == 0
    assert_same_run(run, whole)


def test_resume_accepts_the_runs_own_config_yaml(model: str, data: Path, whole: Path, run: Path) -> None:
    """A new run could not start in the folder of its settings file; a resumed run may."""
    stopped_run(model, data, run, 3)
    config = ["--config", str(run / "config.yaml")]
    assert main(["train", *config, "--resume", str(run), "--blas", "off"]) == 0
    assert_same_run(run, whole)


def test_a_run_can_be_resumed_from_another_folder_and_under_another_name(
    model: str, data: Path, whole: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model and data were given as relative paths."""
    monkeypatch.chdir(tmp_path)
    stopped_run(os.path.relpath(model), Path(data.name), Path("run"), 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.rename("moved")
    assert main(["train", "--resume", "moved", "--blas", "off"]) == 0
    assert_same_run(Path("moved"), whole)


def test_a_killed_run_resumes_bit_exactly(
    model: str, data: Path, whole: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after step 5, saved at step 4, with a half-written line in the metrics."""
    command = stopped_run(model, data, run, 5, killed=True)
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 6, "loss_na')
    assert main([*command, "--resume", str(run)]) == 0
    assert "after step 4" in capsys.readouterr().out
    assert_same_run(run, whole)


def test_a_stopped_run_is_not_overwritten_by_the_same_command(
    model: str, data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = stopped_run(model, data, run, 4)
    before = (run / "training_state.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*command, "--adapter-path", str(run)]) == 2
    assert f"holds an unfinished run: resume it with --resume {run}" in capsys.readouterr().err
    assert (run / "training_state.safetensors").read_bytes() == before


def test_overwrite_removes_the_best_adapter_of_the_old_run(
    model: str, data: Path, whole: Path, run: Path
) -> None:
    """The new run has no validation data, so it has no best adapter."""
    shutil.copytree(whole, run)
    (data / "valid.jsonl").unlink()
    command = ["train", "--model", model, "--data", str(data), *SETTINGS, "--adapter-path", str(run)]
    assert main([*command, "--overwrite"]) == 0
    assert not (run / "best").exists()


@pytest.mark.parametrize(
    ("flags", "changed_file", "message"),
    mostly_at_night(
        [
            (["--seed", "4"], "", "seed must be as in the run to resume: it was 0, got 4"),
            ([], "train.jsonl", "the training data must be as in the run to resume"),
            (["--no-mask-prompt"], "", "the training data must be as in the run to resume"),
            (
                ["--learning-rate", "0.1"],
                "",
                "learning_rate must be as in the run to resume: it was 0.0003, got 0.1",
            ),
            (
                ["--dtype", "bfloat16"],
                "",
                "dtype must be as in the run to resume: it was float32, got bfloat16",
            ),
            (
                ["--steps-per-eval", "2"],
                "",
                "steps_per_eval must be as in the run to resume: it was 3, got 2",
            ),
            (["--num-questions", "0"], "", "the questions must be as in the run to resume"),
            ([], "valid.jsonl", "the validation data must be as in the run to resume"),
            ([], "test.jsonl", "the questions must be as in the run to resume"),
            (
                ["--adapter-path", "x"],
                "",
                "--resume already names the run's folder: leave --adapter-path out",
            ),
        ],
        3,
    ),
)
def test_resume_refuses_changed_settings_and_data_by_name(
    model: str,
    data: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    changed_file: str,
    message: str,
) -> None:
    """One sentence, before anything is written."""
    command = stopped_run(model, data, run, 2)
    if changed_file:
        line = conversation_line("xx", "3 yes", answer="yes")
        (data / changed_file).write_text(line + "\n" * 2 + line.replace("3", "4") + "\n")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    capsys.readouterr()
    iters = ["--iters", "8"]  # a shorter file would change the number that follows from --epochs
    command = [c for c in command if c not in ("--epochs", "4")] + iters
    assert main([*command, "--resume", str(run), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_without_a_run_and_a_finished_run_cannot_be_resumed(
    model: str, data: Path, whole: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", model, "--data", str(data), *SETTINGS, "--resume"]
    assert main([*command, str(run / "nothing")]) == 2
    assert "nothing: must hold a run, and has no manifest.json" in capsys.readouterr().err
    assert not run.exists()
    assert main([*command, str(whole)]) == 2
    error = capsys.readouterr().err
    assert "the run to resume must be unfinished, but it is finished" in error
    assert f"start a new run with --init-adapter {whole}" in error


def test_a_run_of_an_older_version_is_refused_with_advice(
    model: str, data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training state of an older format, and a run without a manifest."""
    stopped_run(model, data, run, 4)
    state = run / "training_state.safetensors"
    arrays, metadata = mx.load(str(state), return_metadata=True)
    mx.save_safetensors(str(state), arrays, {**metadata, "format": "mlx-lora-training-state-2"})
    assert main(["train", "--resume", str(run), "--blas", "off"]) == 2
    error = capsys.readouterr().err
    assert "must be of the format mlx-lora-training-state-4, got 'mlx-lora-training-state-2'" in error
    assert "begin a new one from its adapter with --init-adapter" in error
    (run / "manifest.json").unlink()
    assert main(["train", "--resume", str(run), "--blas", "off"]) == 2
    error = capsys.readouterr().err
    assert "holds a run of an older version without manifest.json, which cannot be resumed" in error
    assert f"start a new run from its adapter with --init-adapter {run}" in error


def test_resuming_with_another_library_says_that_it_is_not_bit_exact(
    model: str, data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_run(model, data, run, 4)
    path = run / "manifest.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"versions": record["versions"] | {"BLAS": "another"}}))
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--blas", "off"]) == 0
    assert "           not bit-exact: BLAS was another and is now MLX's own\n" in capsys.readouterr().out


def test_a_plain_run_is_resumed_by_the_fast_path_and_says_that_it_is_not_bit_exact(
    model: str, data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the other way: each of the two paths resumes what the other saved."""
    begin = ["train", "--model", model, "--data", str(data), *SETTINGS, "--adapter-path", str(run), "--plain"]
    with monkeypatch.context() as patches:
        stop_after(3, patches, killed=False)
        assert main(begin) == INTERRUPTED
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--no-plain", "--blas", "off"]) == 0
    said = "           not bit-exact: it was trained by the plain path and is now by the fast path\n"
    assert said in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_missing_training_state_is_an_error_and_not_a_new_start(
    model: str, data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_run(model, data, run, 4)
    (run / "training_state.safetensors").unlink()
    assert main(["train", "--resume", str(run), "--blas", "off"]) == 2
    assert "training_state.safetensors: a run to resume must have this file" in capsys.readouterr().err


def test_training_stops_early_after_patience_validations(
    model: str, data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At learning rate 0 the loss never improves: the first validation stays the best."""
    arguments = ["train", "--model", model, "--data", str(data), "--adapter-path", str(run), "--json"]
    flags = ["--learning-rate", "0", "--steps-per-eval", "1", "--patience", "2", "--iters", "9"]
    assert main([*arguments, *flags, "--rank", "2", "--blas", "off"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["iters"] == 2 and report["valid_best_step"] == 0
    assert "stopped at step 2: 2 validations without a better loss" in printed.err
    assert (run / "best" / "adapter_config.json").exists()


def test_early_stopping_needs_validation_data(
    model: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "valid.jsonl").unlink()
    assert main(["train", "--model", model, "--data", str(data), "--blas", "off", "--patience", "1"]) == 2
    assert f"--patience needs validation data, and {data} has no valid.jsonl" in capsys.readouterr().err


def test_resume_is_bit_exact_in_bfloat16_and_packed(model: str, data: Path, tmp_path: Path) -> None:
    flags = ["--batching", "packed", "--dtype", "bfloat16"]
    command = ["train", "--model", model, "--data", str(data), *SETTINGS, *flags]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main([*command, "--max-seq-length", "64", "--adapter-path", str(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, patch, killed=False)
        assert main([*command, "--max-seq-length", "64", "--adapter-path", str(part)]) == INTERRUPTED
    assert main([*command, "--max-seq-length", "64", "--resume", str(part)]) == 0
    assert_same_run(part, whole)
