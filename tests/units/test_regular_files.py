"""Every input must be a regular file: a named pipe, on which reading would wait forever, is refused."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.training.run_folder import RunFolder
from mlx_impl.config import LoRAConfig
from mlx_impl.files.adapters import save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.lora import add_lora
from tests.nightly import mostly_at_night
from tests.tiny_folder import write_data, write_folder

MODEL_FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", "a.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "generation_config.json", "chat_template.jinja"),
    "additional_chat_templates/a.jinja",
)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End the process if it opens a named pipe: it would wait forever, in C code."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Folders with a model, data, and adapters in both formats."""
    model = load_model(write_folder(tmp_path / "model")).model
    write_data(tmp_path / "data")
    config = LoRAConfig(rank=2, target_modules=("q_proj",))
    add_lora(model, config)
    for form in ("peft", "mlx-lm"):
        save_adapter(model, config, tmp_path / form / "adapter", "tiny", form)  # creates the folders
    (tmp_path / "config.yaml").write_text("rank: 2")
    return tmp_path


def replace(path: Path, kind: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        path.unlink()
    if path.name == "a.safetensors":  # read only if there is no model.safetensors
        (path.parent / "model.safetensors").rename(path.parent / "b.safetensors")
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([*arguments, "--blas", "off"] if arguments[0] != "convert" else arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a folder"])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_models_files_must_be_regular(
    inputs: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = inputs / "model" / name
    replace(path, kind)
    error = error_of(["generate", "--model", str(inputs / "model"), "--prompt", "x"], capsys)
    assert error == f"error: {path}: must be a regular file, but is {kind}"


@pytest.mark.parametrize("name", ["a.gguf", "folder.gguf/a.gguf"])
def test_a_gguf_file_must_be_regular(inputs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = inputs / name
    replace(path, "a named pipe")
    error = error_of(["generate", "--model", str(path), "--prompt", "x"], capsys)
    assert error == f"error: {path}: must be a regular file, but is a named pipe"


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_data_files_must_be_regular(inputs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = inputs / "data" / f"{name}.jsonl"
    replace(path, "a named pipe")
    arguments = ["--model", str(inputs / "model"), "--data", str(inputs / "data"), "--adapter-path"]
    error = error_of(["train", *arguments, str(inputs / "run"), "--iters", "1"], capsys)
    assert error == f"error: {path}: must be a regular file, but is a named pipe"


@pytest.mark.parametrize("command", ["generate", "fuse", "convert"])
@pytest.mark.parametrize("form", ["peft", "mlx-lm"])
@pytest.mark.parametrize("kind", ["a named pipe", "a folder"])
def test_an_adapters_files_must_be_regular(
    inputs: Path, command: str, form: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"peft": "adapter_model.safetensors", "mlx-lm": "adapters.safetensors"}
    adapter = inputs / form / "adapter"
    arguments = {
        "generate": ["--model", str(inputs / "model"), "--prompt", "x"],
        "fuse": ["--model", str(inputs / "model"), "--save-path", str(inputs / "out")],
        "convert": ["--save-path", str(inputs / "out"), "--to", "mlx-lm" if form == "peft" else "peft"],
    }[command]
    for name in (names[form], "adapter_config.json"):  # the configuration is read first
        replace(adapter / name, kind)
        error = error_of([command, *arguments, "--adapter-path", str(adapter)], capsys)
    assert error == f"error: {adapter / name}: must be a regular file, but is {kind}"
    assert not (inputs / "out").exists()


def test_files_that_fuse_copies_must_be_regular(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = inputs / "model" / "LICENSE"
    replace(path, "a named pipe")
    (inputs / "model" / "tokenizer").mkdir()  # a folder is not copied
    arguments = ["--model", str(inputs / "model"), "--adapter-path", str(inputs / "peft" / "adapter")]
    error = error_of(["fuse", *arguments, "--save-path", str(inputs / "out")], capsys)
    assert error == f"error: {path}: must be a regular file, but is a named pipe"
    path.unlink()
    assert main(["fuse", *arguments, "--save-path", str(inputs / "out"), "--blas", "off"]) == 0


@pytest.mark.parametrize("kind", mostly_at_night(["a named pipe", "a device", "a folder"], 1))
@pytest.mark.parametrize(
    "name", ["manifest.json", "before.json", "metrics.jsonl", "training_state.safetensors"]
)
def test_the_files_of_a_run_to_resume_must_be_regular(
    inputs: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = inputs / "run"
    train = ["train", "--model", str(inputs / "model"), "--data", str(inputs / "data"), "--iters", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda _: None)  # as if the run had been killed before
        assert main([*train, "--adapter-path", str(run), "--blas", "off"]) == 0
    replace(run / name, kind)
    error = error_of(["train", "--resume", str(run)], capsys)
    assert error.startswith(f"error: {run / name}: must ")


def test_a_settings_file_must_be_regular(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(inputs / "config.yaml", "a device")
    error = error_of(["train", "--config", str(inputs / "config.yaml")], capsys)
    assert error == f"error: {inputs / 'config.yaml'}: must be a regular file, but is a device"


def test_links_to_regular_files_are_read(inputs: Path) -> None:
    """The cache of the Hugging Face hub consists of links."""
    for path in [*(inputs / "model").iterdir(), *(inputs / "data").iterdir()]:
        path.rename(inputs / f"blob-{path.name}")
        path.symlink_to(f"../blob-{path.name}")
    arguments = ["--model", str(inputs / "model"), "--data", str(inputs / "data")]
    adapter = ["--adapter-path", str(inputs / "peft" / "adapter")]
    assert main(["evaluate", *arguments, *adapter, "--blas", "off"]) == 0
    assert main(["fuse", *arguments[:2], *adapter, "--save-path", str(inputs / "out"), "--blas", "off"]) == 0
    assert not any(path.is_symlink() for path in (inputs / "out").iterdir())
