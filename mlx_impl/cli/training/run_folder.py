"""What a run leaves in its folder: manifest, settings, state, metrics, report, last and best adapter."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from ... import __version__ as mlx_impl_version
from ...data import Example
from ...disk.files import one_line, read_json_object, read_text, whole_file
from ...files.adapters import save_adapter
from ...machine.blas import load_optimized_blas
from ...run.trainer import LoRATrainer
from ...train import StepRecord
from ..screen.curve import save_loss_curve
from ..settings.config_file import to_yaml
from . import manifest
from .answers import Answer, Exam
from .lock import require_held
from .manifest import Manifest

VERSIONS = {"mlx_impl": mlx_impl_version, "mlx": mx.__version__}
OF_AN_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class RunFolder:
    """Every file is written whole or not at all, but for the metrics, which grow by a line a step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state, self.report = path / "training_state.safetensors", path / "report.json"

    def begin(self, settings: dict[str, Any], identity: dict[str, Any], before: Exam) -> None:
        """The manifest first: with it the new run takes the place of the old one, if there is one."""
        require_held(self.path)
        has_old = (self.path / manifest.NAME).exists()
        to_remove = (manifest.read(self.path).finished or {}) if has_old else {}
        settings = anchored(settings)
        manifest.write(self.path, Manifest(settings, identity, programs(), None, to_remove))
        manifest.remove_the_run_before(self.path)
        self.go_on(settings)
        self.save_before(before)

    def go_on(self, settings: dict[str, Any]) -> None:
        """Write the settings, if the run was stopped before it had."""
        if not (self.path / "config.yaml").exists():
            self.save_config(anchored(settings))

    def changed_programs(self) -> list[str]:
        """What the run that is resumed was computed with, where that is another now."""
        now, before = programs(), manifest.read(self.path).versions
        changed = [name for name in now if before.get(name) != now[name]]
        return [f"{name} was {one_line(before.get(name))} and is {now[name]}" for name in changed]

    def has_begun(self) -> bool:
        return (self.path / manifest.NAME).exists()

    def finish(self) -> None:
        require_held(self.path)
        manifest.finish(self.path)

    def claim(self, *names: str) -> None:
        """Before these files are written: the folder is still this run's, and they are."""
        require_held(self.path)
        manifest.claim(self.path, *names)

    def save_config(self, settings: dict[str, Any]) -> None:
        """What `train --config` repeats the run with."""
        self.claim("config.yaml")
        versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
        text = (
            f"# {versions}; repeat the run with: python -m mlx_impl train --config FILE\n{to_yaml(settings)}"
        )
        with whole_file(self.path / "config.yaml") as part:
            part.write_text(text, encoding="utf-8")

    def save(self, trainer: LoRATrainer, examples: list[Example], base_name: str) -> None:
        """The state to go on from, which is confirmed to be sound, and the adapter."""
        self.claim(self.state.name, *OF_AN_ADAPTER)
        trainer.save(self.state, examples)
        save_adapter(trainer.model, trainer.lora, self.path, base_name)

    def save_best(self, trainer: LoRATrainer, base_name: str) -> None:
        folder = self.path / "best"
        self.claim(*(f"best/{name}" for name in OF_AN_ADAPTER))
        if folder.is_symlink():
            raise ValueError(f"{folder}: must be a folder of the run, and is a link")
        folder.mkdir(exist_ok=True)
        save_adapter(trainer.model, trainer.lora, folder, base_name)

    def open_metrics(self, kept: list[StepRecord]) -> TextIO:
        """The metrics file with the lines of these records, open for more."""
        path = self.path / "metrics.jsonl"
        self.claim(path.name)
        with whole_file(path) as part:
            part.write_text("".join(json.dumps(asdict(record)) + "\n" for record in kept), encoding="utf-8")
        return open(path, "a", encoding="utf-8")

    def require_metrics(self, metrics: TextIO) -> None:
        """ValueError where the file that is written to is no longer that of the folder."""
        path = self.path / "metrics.jsonl"
        try:
            is_same = os.path.samestat(os.fstat(metrics.fileno()), os.stat(path))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise ValueError(f"{path}: was removed or replaced while the run was going on")

    def read_metrics(self, last_step: int) -> list[StepRecord]:
        """The records up to a step, of the run that is resumed."""
        path = self.path / "metrics.jsonl"
        try:
            lines = read_text(path).split("\n")[:last_step] if last_step else []
            records = [StepRecord(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError, RecursionError):
            records = []
        if [record.step for record in records] != list(range(1, last_step + 1)):
            raise ValueError(f"{path}: must have a line for each of the {last_step} steps done")
        return records

    def read_before(self, last_step: int) -> Exam | None:
        """What the model knew before the run; None where that was stopped before it was saved."""
        path = self.path / "before.json"
        if not path.exists() and last_step == 0:
            return None
        raw = read_json_object(path)
        try:
            answers = {name: [Answer(**row) for row in rows] for name, rows in raw["answers"].items()}
            return Exam(float(raw["loss_nats"]), answers)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path}: is not what a run writes") from None

    def save_before(self, before: Exam) -> None:
        rows = {name: [asdict(answer) for answer in group] for name, group in before.answers.items()}
        self.write_json("before.json", {"loss_nats": before.loss_nats, "answers": rows})

    def save_curve(self, records: list[StepRecord], trainer: LoRATrainer) -> None:
        self.claim("loss.png")
        save_loss_curve(records, trainer.validation, self.path / "loss.png")

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        self.claim(name)
        with whole_file(self.path / name) as part:
            part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def programs() -> dict[str, str]:
    """All that decides the last bits."""
    return {**VERSIONS, "BLAS": load_optimized_blas("off").name or "MLX's own"}


def anchored(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with absolute paths, so that a run can be resumed and repeated from any folder."""
    paths = {key: Path(settings[key]) for key in ("model", "data", "init_adapter") if key in settings}
    return settings | {key: str(path.absolute()) for key, path in paths.items() if path.exists()}
