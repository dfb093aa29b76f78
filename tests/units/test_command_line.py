"""The command line: the files that it writes, and one sentence, and no file, for a wrong input."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.settings import flags
from mlx_impl.cli.shell_command import shell_command
from tests.tiny_folder import conversation_line, write_data, write_folder

TINY_RUN = ["--rank", "2", "--iters", "3", "--batch-size", "4", "--blas", "off"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_folder(model: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("run") / "adapters"
    arguments = ["train", "--model", model, "--data", str(data), "--adapter-path", str(folder)]
    assert main([*arguments, *TINY_RUN]) == 0
    return folder


def test_train_writes_adapter_metrics_curve_and_report(run_folder: Path) -> None:
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "before.json",
        "best",
        "config.yaml",
        "loss.png",
        "manifest.json",
        "metrics.jsonl",
        "report.html",
        "report.json",
        "training_state.safetensors",
    ]
    assert (run_folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_line_per_step(run_folder: Path) -> None:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    keys = {"loss_nats", "num_targets", "learning_rate", "seconds", "peak_bytes"}
    assert all(keys <= line.keys() for line in lines)
    one_epoch = lines[0]["num_targets"] + lines[1]["num_targets"]
    assert one_epoch == 6 * len(("0", " ", "y", "es", "<|im_end|>"))


def test_the_report_has_losses_and_fractions_of_right_answers(run_folder: Path) -> None:
    report = json.loads((run_folder / "report.json").read_text())
    assert report["loss_last"] < report["loss_first"]
    assert report["peak_bytes"] > 0 and report["step_seconds_median"] > 0
    for name in ("trained_before", "trained_after", "unseen_before", "unseen_after"):
        assert 0 <= report[name] <= 1


def test_evaluate_prints_one_json_object(
    model: str, data: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", model, "--data", str(data), "--json", "--blas", "off"]
    assert main(["evaluate", *common]) == 0
    base = json.loads(capsys.readouterr().out)
    assert main(["evaluate", *common, "--adapter-path", str(run_folder)]) == 0
    adapted = json.loads(capsys.readouterr().out)
    report = json.loads((run_folder / "report.json").read_text())
    assert math.isclose(base["loss_nats"], report["loss_first"], rel_tol=1e-6)  # test.jsonl = train.jsonl
    assert math.isclose(adapted["loss_nats"], report["loss_last"], rel_tol=1e-6)
    assert base["perplexity"] == math.exp(base["loss_nats"])


def test_the_loss_does_not_depend_on_the_batch_size(
    model: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for size in ("1", "4", "8"):
        main(["evaluate", "--model", model, "--data", str(data), "--json", "--blas", "off",
              "--batch-size", size])  # fmt: skip
        losses.append(json.loads(capsys.readouterr().out)["loss_nats"])
    assert max(losses) - min(losses) <= 8 * 2.0**-24 * max(losses)


def test_generate_prints_one_json_object(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", model, "--prompt", "Hi", "--max-tokens", "5", "--json", "--blas", "off"]
    assert main(["generate", *arguments]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first.keys() == {"prompt", "prompt_tokens", "tokens", "text", "finish_reason"}
    assert len(first["tokens"]) == 5 and first["finish_reason"] == "length"
    main(["generate", *arguments, "--temperature", "1", "--seed", "3"])
    sampled = json.loads(capsys.readouterr().out)
    assert sampled["tokens"] != first["tokens"]
    main(["generate", *arguments, "--temperature", "1", "--seed", "3"])
    assert json.loads(capsys.readouterr().out) == sampled


def test_train_continues_from_an_adapter(
    model: str, data: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first loss of the second run is the last loss of the first."""
    arguments = ["train", "--model", model, "--data", str(data), "--adapter-path", str(tmp_path)]
    flags = ["--init-adapter", str(run_folder), "--iters", "1", "--json", "--blas", "off"]
    assert main([*arguments, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss_first"] == json.loads((run_folder / "report.json").read_text())["loss_last"]
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["r"] == 2


@pytest.mark.parametrize(("batching", "updates"), [("plain", 6), ("grouped", 6), ("packed", 4)])
def test_every_kind_of_batching_runs_the_given_number_of_epochs(
    model: str, tmp_path: Path, batching: str, updates: int
) -> None:
    """Packed: examples of 25, 27, ... 43, 46 inputs fill eight rows of 60, two per batch."""
    arguments = ["train", "--model", model, "--data", str(write_data(tmp_path / "data", num_examples=11))]
    arguments += ["--batching", batching, "--batch-size", "2", "--max-seq-length", "60", "--epochs", "2"]
    assert main([*arguments, "--adapter-path", str(tmp_path / "run"), "--blas", "off"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["iters"] == 2 * updates


def test_truncated_and_skipped_examples_are_reported(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts have 20, 22, ... tokens; replies have five, with the end of the turn."""
    arguments = ["train", "--model", model, "--data", str(write_data(tmp_path / "data", num_examples=11))]
    arguments += ["--iters", "1", "--max-seq-length", "38", "--adapter-path", str(tmp_path / "run")]
    assert main([*arguments, "--blas", "off"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 11 training examples were cut to 38 tokens" in shown
    assert "2 of 11 validation examples left out, without a target within 38 tokens" in shown
    assert "valid.jsonl:10" in shown


def test_epochs_count_passes_over_the_data(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six examples in batches of four are two updates per epoch."""
    arguments = ["train", "--model", model, "--data", str(data), "--adapter-path", str(tmp_path)]
    assert main([*arguments, "--epochs", "2", "--rank", "2", "--json", "--blas", "off"]) == 0
    assert json.loads(capsys.readouterr().out)["iters"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "nowhere: a model must be a Hugging Face folder or a .gguf file"),
        (["--data", "nowhere"], "--data must be a folder, got nowhere"),
        (["--rank", "0"], "rank must be at least 1, got 0"),
        (["--rank", "17"], "rank must be at most 16, the smaller side of"),
        (["--target-modules", "w1,q_proj"], "target modules must be among down_proj, gate_proj"),
        (["--target-modules", ""], "got none"),
        (["--num-layers", "3"], "num_layers must be at most the model's 2, got 3"),
        (["--num-layers", "0"], "num_layers must be -1 (all) or at least 1, got 0"),
        (["--targets", "all", "--mask-prompt"], "--mask-prompt is another name for --targets"),
        (["--max-seq-length", "9"], "no example has a target within the maximum of 9 tokens"),
        (["--max-seq-length", "0"], "--max-seq-length must be at least 1, got 0"),
        (["--iters", "0"], "iters must be at least 1, got 0"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--learning-rate", "nan"], "learning_rate must be finite and at least 0, got nan"),
        (["--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["--alpha", "inf"], "alpha must be finite and positive, got inf"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--data-seed", str(2**32)], "data_seed must be at least 0 and less than 2**32, got 4294967296"),
        (["--num-questions", "-1"], "--num-questions must be at least 0, got -1"),
        (["--patience", "-1"], "--patience must be at least 0, got -1"),
        (["--save-every", "0"], "--save-every must be at least 1, got 0"),
        (["--grad-accumulation-steps", "0"], "--grad-accumulation-steps must be at least 1, got 0"),
        (["--max-grad-norm", "-1"], "max_grad_norm must be finite and at least 0, got -1.0"),
        (["--iters", "3", "--warmup-steps", "4"], "warmup_steps must be at most iters, got 4 and 3"),
        (["--loraplus-lr-ratio", "0"], "loraplus_lr_ratio must be finite and positive, got 0.0"),
        (["--rank-pattern", "q_proj"], "--rank-pattern must be NAME=N,NAME=N,... with different names and N"),
        (["--rank-pattern", "q_proj=4.5"], "with different names and N a whole number, got 'q_proj=4.5'"),
        (["--rank-pattern", "q_proj=4,q_proj=2"], "with different names and N a whole number"),
        (["--target-modules", "q_proj=8"], "target modules must be among"),
        (["--alpha-pattern", "w1=3"], "alpha_pattern must match targeted linears, and 'w1' matches none"),
        (["--target-regex", "("], "'(' must be a regular expression"),
        (["--init-adapter", "x", "--use-dora"], "--init-adapter sets --use-dora: give only one of them"),
        (["--resume", "x"], "--resume already names the run's folder: leave --adapter-path out"),
        (["--alpha", "0"], "alpha must be finite and positive, got 0.0"),
        (["--learning-rate", "1e39"], "learning_rate must be at most 3.4e+38, float32's largest, got 1e+39"),
        (
            ["--learning-rate", "1e38", "--loraplus-lr-ratio", "16"],
            "learning_rate * loraplus_lr_ratio must be at most 3.4e+38",
        ),
        (["--eval-examples", "0"], "--eval-examples must be at least 1, or -1 for all, got 0"),
        (["--init-adapter", "nowhere"], "nowhere: must hold PEFT's adapter_model.safetensors or"),
        (["--init-adapter", "x", "--rank", "4"], "--init-adapter sets --rank: give only one of them"),
        (
            ["--adapter-path", "/dev/null/x"],
            "/dev/null/x: must be a folder that can be written to: Not a directory",
        ),
    ],
)
def test_a_wrong_flag_ends_in_one_sentence(
    model: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """Exit code 2, one line on standard error, and no folder created."""
    folder = tmp_path / "run"
    arguments = ["train", "--model", model, "--data", str(data), "--adapter-path", str(folder)]
    assert main([*arguments, "--blas", "off", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not folder.exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_last_good_state(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the step and the examples; the saved adapter can be evaluated and trained further."""
    common, run = ["--model", model, "--data", str(data), "--blas", "off"], tmp_path / "run"
    train = ["train", *common, "--adapter-path", str(run), "--rank", "2", "--iters", "3"]
    assert main([*train, "--steps-per-eval", "3", "--learning-rate", "1e30"]) == 2
    error, resume_hint = capsys.readouterr().err.splitlines()
    assert re.search(
        r"error: the loss is not finite at step 2, on the examples \d, \d; .* back at step 0", error
    )
    assert not (run / "report.json").exists()
    assert main(["evaluate", *common, "--adapter-path", str(run), "--json"]) == 0
    command = resume_hint.removeprefix(f"continue at a lower learning rate with: {shell_command()} ")
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "run-2" / "report.json").exists()


def test_an_adapter_that_the_last_step_made_infinite_is_rolled_back(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step's own loss is finite, but the adapter after it is not; the state before the step is saved."""
    common = ["--model", model, "--data", str(data), "--adapter-path", str(tmp_path), "--blas", "off"]
    flags = ["--rank", "2", "--iters", "1", "--learning-rate", "1e30"]
    assert main(["train", *common, *flags]) == 2
    assert "the loss after step 1 is not finite; the adapter is back at step 0" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()
    assert main(["evaluate", *common, "--json"]) == 0


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_impl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "a", "--blas", "nowhere.so"),
        ("generate", "--prompt", "a", "--model", "README.md"),
        ("evaluate", "--data", "tests"),
        ("generate", "--prompt", "a", "--temperature", "-1"),
        ("generate", "--prompt", "a", "--max-tokens", "0"),
    ],
)
def test_a_wrong_input_has_no_traceback_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = run_process(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_mistyped_flag_is_an_error_that_names_the_closest_flag() -> None:
    done = run_process("train", "--iter", "3")
    assert done.returncode == 2
    assert "unrecognized arguments: --iter 3; the closest flag is --iters" in done.stderr


def test_a_bad_line_of_data_is_named_by_file_and_number(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").write_text(conversation_line("a", "b") + '\n{"messages": 3}\n')
    assert main(["train", "--model", model, "--data", str(tmp_path), "--blas", "off"]) == 2
    assert f"{tmp_path}/train.jsonl:2: " in capsys.readouterr().err


def test_without_the_geography_data_the_error_asks_for_a_folder(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a copy of the package's folder alone; the wheel has the data (test_installed.py)."""
    monkeypatch.setattr(flags, "GEOGRAPHY", tmp_path / "absent")
    assert main(["evaluate", "--model", model, "--blas", "off"]) == 2
    assert "give --data DIR" in capsys.readouterr().err
