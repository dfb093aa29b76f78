"""The installed package: its command `mlx-lora`, `--version`, and the default data in the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import mlx_impl
from mlx_impl.__main__ import main
from mlx_impl.cli.shell_command import program, shell_command

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_command_mlx_lora_is_python_m_mlx_impl() -> None:
    module, _, name = PROJECT["project"]["scripts"]["mlx-lora"].partition(":")
    assert getattr(import_module(module), name) is main


def test_version_names_the_package_and_mlx(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"mlx-lora {mlx_impl.__version__}" in shown and f"mlx {version('mlx')}" in shown


def test_help_and_hints_name_the_command_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mlx-lora", "train"])
    assert program() == "mlx-lora" and shell_command("train") == "/somewhere/bin/mlx-lora train"
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/bin/{name}")
    assert shell_command("train", "a b") == "mlx-lora train 'a b'"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "mlx_impl" / "__main__.py"), "train"])
    assert program() == "python -m mlx_impl" and shell_command("train").endswith(" -m mlx_impl train")


def test_the_wheel_holds_the_default_data(tmp_path: Path) -> None:
    """What the wheel is made of, away from the clone: the package, and the files of force-include."""
    shutil.copytree(ROOT / "mlx_impl", tmp_path / "mlx_impl", ignore=shutil.ignore_patterns("__pycache__"))
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        shutil.copytree(ROOT / source, tmp_path / target)
    code = "from mlx_impl.cli.settings.flags import data_folder; print(data_folder(None))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "mlx_impl"), done.stderr
    ours = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert ours == {p.name: p.read_bytes() for p in (ROOT / "fixtures" / "geography").iterdir()}
    assert {"train.jsonl", "valid.jsonl", "test.jsonl", "control.jsonl"} == ours.keys()
