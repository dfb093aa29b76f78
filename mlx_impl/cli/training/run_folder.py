"""The files of a run: manifest, settings, training state, metrics, report, curve, last and best adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from ... import __version__ as mlx_impl_version
from ...data import Example
from ...disk.files import atomic_write, one_line, read_json_object, read_text
from ...files.adapters import save_adapter
from ...machine.blas import load_optimized_blas
from ...run.trainer import LoRATrainer
from ...text.template_choice import FILE as TEMPLATE_FILE
from ...train import StepRecord
from ..screen.curve import save_loss_curve
from ..settings.config_file import to_yaml
from . import manifest
from .answers import Answer, Evaluation
from .lock import require_held
from .manifest import Manifest

VERSIONS = {"mlx_impl": mlx_impl_version, "mlx": version("mlx")}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class RunFolder:
    """Writes and reads the files of a run. All writes are atomic, except the metrics: one line per step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "training_state.safetensors"
        self.chat_template: str | None = None  # saved with the adapter; None: the model's own

    def start(self, settings: dict[str, Any], identity: dict[str, Any], before: Evaluation) -> None:
        """Write the manifest first: it replaces that of the previous run, if there is one."""
        require_held(self.path)
        has_old = (self.path / manifest.NAME).exists()
        to_remove = (manifest.read(self.path).finished or {}) if has_old else {}
        settings = with_absolute_paths(settings)
        manifest.write(self.path, Manifest(settings, identity, library_versions(), None, to_remove))
        manifest.remove_previous_run(self.path)
        self.save_missing_config(settings)
        self.save_before(before)

    def save_missing_config(self, settings: dict[str, Any]) -> None:
        """Write config.yaml unless it exists: a run may be stopped before it has written it."""
        if not (self.path / "config.yaml").exists():
            self.save_config(with_absolute_paths(settings))

    def changed_versions(self) -> list[str]:
        """A sentence for each library whose version has changed since the run started."""
        now, before = library_versions(), manifest.read(self.path).versions
        changed = [name for name in now if before.get(name) != now[name]]
        return [f"{name} was {one_line(before.get(name))} and is now {now[name]}" for name in changed]

    def changed_path(self, plain: bool) -> list[str]:
        """A sentence where the run started on the other of the plain and the fast path."""
        before = manifest.read(self.path).settings.get("plain", False)
        if before == plain:
            return []
        was, now = ("plain", "fast") if before else ("fast", "plain")
        return [f"it was trained by the {was} path and is now by the {now} path"]

    def has_started(self) -> bool:
        return (self.path / manifest.NAME).exists()

    def finish(self) -> None:
        require_held(self.path)
        manifest.finish(self.path)

    def register(self, *names: str) -> None:
        """Call before writing these files: ValueError where the folder or a file is not this run's."""
        require_held(self.path)
        manifest.register(self.path, *names)

    def save_config(self, settings: dict[str, Any]) -> None:
        """Write config.yaml, with which `train --config` repeats the run."""
        self.register("config.yaml")
        versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
        text = (
            f"# {versions}; repeat the run with: python -m mlx_impl train --config FILE\n{to_yaml(settings)}"
        )
        with atomic_write(self.path / "config.yaml") as part:
            part.write_text(text, encoding="utf-8")

    def save(self, trainer: LoRATrainer, examples: Sequence[Example], base_name: str) -> None:
        """Write the training state and the adapter; NotFinite, before any write, if they are not finite."""
        self.register(self.state.name, *self.adapter_files())
        trainer.save(self.state, examples)
        self.save_adapter(trainer, self.path, base_name)

    def save_best(self, trainer: LoRATrainer, base_name: str) -> None:
        folder = self.path / "best"
        self.register(*(f"best/{name}" for name in self.adapter_files()))
        if folder.is_symlink():
            raise ValueError(f"{folder}: must be a folder of the run, but is a link")
        folder.mkdir(exist_ok=True)
        self.save_adapter(trainer, folder, base_name)

    def adapter_files(self) -> tuple[str, ...]:
        return ADAPTER_FILES if self.chat_template is None else (*ADAPTER_FILES, TEMPLATE_FILE)

    def save_adapter(self, trainer: LoRATrainer, folder: Path, base_name: str) -> None:
        template = self.chat_template
        save_adapter(trainer.model, trainer.lora, folder, base_name, chat_template=template)

    def open_metrics(self, kept: list[StepRecord]) -> TextIO:
        """Write the lines of these records, and return the metrics file open for appending."""
        path = self.path / "metrics.jsonl"
        self.register(path.name)
        with atomic_write(path) as part:
            part.write_text("".join(json.dumps(asdict(record)) + "\n" for record in kept), encoding="utf-8")
        return open(path, "a", encoding="utf-8")

    def require_metrics(self, metrics: TextIO) -> None:
        """ValueError where the folder's metrics.jsonl is no longer the open file."""
        path = self.path / "metrics.jsonl"
        try:
            is_same = os.path.samestat(os.fstat(metrics.fileno()), os.stat(path))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise ValueError(f"{path}: was removed or replaced during the run")

    def read_metrics(self, last_step: int) -> list[StepRecord]:
        """The records of steps 1 to `last_step`; a later line, perhaps half-written, is ignored."""
        path = self.path / "metrics.jsonl"
        try:
            lines = read_text(path).split("\n")[:last_step] if last_step else []
            records = [StepRecord(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError, RecursionError):
            records = []
        if [record.step for record in records] != list(range(1, last_step + 1)):
            raise ValueError(f"{path}: must have a line for each of the {last_step} completed steps")
        return records

    def read_before(self, last_step: int) -> Evaluation | None:
        """The evaluation before training; None where the run was stopped before saving it."""
        path = self.path / "before.json"
        if not path.exists() and last_step == 0:
            return None
        raw = read_json_object(path)
        try:
            answers = {name: [Answer(**row) for row in rows] for name, rows in raw["answers"].items()}
            return Evaluation(float(raw["loss_nats"]), answers)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path}: must be a file as a run writes it") from None

    def save_before(self, before: Evaluation) -> None:
        rows = {name: [asdict(answer) for answer in group] for name, group in before.answers.items()}
        self.write_json("before.json", {"loss_nats": before.loss_nats, "answers": rows})

    def save_curve(self, records: list[StepRecord], trainer: LoRATrainer) -> None:
        self.register("loss.png")
        save_loss_curve(records, trainer.validation, self.path / "loss.png")

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        self.write_text(name, json.dumps(record, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.register(name)
        with atomic_write(self.path / name) as part:
            part.write_text(text, encoding="utf-8")


def library_versions() -> dict[str, str]:
    """Versions of everything on which bit-exact results depend."""
    return {**VERSIONS, "BLAS": load_optimized_blas("off").name or "MLX's own"}


def with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths, so that a run can be resumed and repeated from any folder."""
    keys = ("model", "data", "init_adapter", "test", "chat_template")
    paths = {key: Path(settings[key]) for key in keys if isinstance(settings.get(key), str)}
    is_there = {**dict.fromkeys(keys, Path.exists), "chat_template": Path.is_file}  # else a template's name
    return settings | {key: str(path.absolute()) for key, path in paths.items() if is_there[key](path)}
