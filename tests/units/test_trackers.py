"""`--report-to`: TensorBoard and Weights & Biases get what metrics.jsonl has."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_impl.__main__ import main
from mlx_impl.cli.training.trackers import tracker_names
from tests.tiny_folder import write_data, write_folder

Sent = dict[str, dict[int, float]]  # values by name and step


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    model, data = write_folder(tmp_path / "model"), write_data(tmp_path / "data")
    words = ["train", "--model", str(model), "--data", str(data), "--adapter-path", str(tmp_path / "run")]
    return [
        *words,
        "--rank",
        "2",
        "--iters",
        "4",
        "--steps-per-eval",
        "2",
        "--num-questions",
        "0",
        "--blas",
        "off",
    ]


def require_all_sent(sent: Sent, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, key in (("train/loss", "loss_nats"), ("train/learning_rate", "learning_rate")):
        assert sent[name] == pytest.approx({line["step"]: line[key] for line in lines}, rel=1e-6)
    validation = json.loads((run / "report.json").read_text())["validation"]
    assert sent["valid/loss"] == pytest.approx(dict(validation), rel=1e-6)


def scalars(folder: Path) -> Sent:
    """Of the event files: records of a length, its checksum, the event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: Sent = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
            content = content[16 + size :]
    return found


def test_tensorboard_has_every_step_and_every_validation(command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    assert main([*command, "--report-to", "tensorboard"]) == 0
    require_all_sent(scalars(tmp_path / "run" / "tensorboard"), tmp_path / "run")


def test_wandb_has_every_step_and_every_validation(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of wandb's documented API: init, log with a step that never falls, finish."""
    sent: Sent = {}
    given: dict[str, Any] = {}
    calls: list[Any] = []

    def log(values: dict[str, float], step: int) -> None:
        calls.append(step)
        for name, value in values.items():
            sent.setdefault(name, {})[step] = value

    def init(**settings: Any) -> SimpleNamespace:
        given.update(settings)
        return SimpleNamespace(log=log, finish=lambda: calls.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert main([*command, "--report-to", "wandb", "--project-name", "mine"]) == 0
    require_all_sent(sent, tmp_path / "run")
    assert given["project"] == "mine" and given["name"] == "run" and given["config"]["rank"] == 2
    assert calls == [*sorted(calls[:-1]), "finished"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere", "--report-to must be tensorboard or wandb, or both with a comma, got 'nowhere'"),
        ("", "--report-to must be tensorboard or wandb"),
        ("wandb", "--report-to wandb needs a package: python -m pip install wandb"),
    ],
)
def test_another_name_or_a_missing_package_ends_in_one_sentence(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*command, "--report-to", value]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_several_names_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace())
    assert tracker_names("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    assert tracker_names(None) == []
