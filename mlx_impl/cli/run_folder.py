"""What a run leaves in its folder: settings, state, metrics, curve, report, the last adapter and the best."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from .. import __version__ as mlx_impl_version
from ..adapters import require_format, save_adapter
from ..data import Example
from ..files import make_run_folder, read_json_object, whole_file
from ..train import StepRecord
from ..trainer import LoRATrainer
from .answers import Answer
from .config_file import to_yaml
from .curve import save_loss_curve

OF_A_RUN = (
    "config.yaml",
    "report.json",
    "metrics.jsonl",
    "before.json",
    "training_state.safetensors",
    "loss.png",
)


class RunFolder:
    """Every file is written whole or not at all, but for the metrics, which grow by a line a step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state, self.report = path / "training_state.safetensors", path / "report.json"

    def require_no_unfinished_run(self) -> None:
        """ValueError where a run was stopped that could still be resumed."""
        if self.state.exists() and not self.report.exists():
            raise ValueError(
                f"{self.path}: holds a run that was stopped: go on with --resume {self.path}, "
                f"or take another folder, or remove {self.state.name}"
            )

    def require_elsewhere(self, adapter: Path) -> None:
        """ValueError for an adapter that `begin` would remove."""
        best = self.path / "best"
        if adapter.resolve() == best.resolve():
            raise ValueError(f"{adapter}: is removed when a run begins in {self.path}: take another folder")

    def begin(self) -> None:
        """Make the folder, or clear it of what a finished run left, but not of its last adapter."""
        make_run_folder(self.path)
        require_format(self.path)
        for name in OF_A_RUN:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "best", ignore_errors=True)

    def save_config(self, settings: dict[str, Any]) -> None:
        """What `train --config` repeats the run with."""
        versions = f"# mlx_impl {mlx_impl_version}, mlx {mx.__version__}"
        text = f"{versions}; repeat the run with: python -m mlx_impl train --config FILE\n{to_yaml(settings)}"
        with whole_file(self.path / "config.yaml") as part:
            part.write_text(text, encoding="utf-8")

    def save(self, trainer: LoRATrainer, examples: list[Example], base_name: str) -> None:
        """The state to go on from, which is confirmed to be sound, and the adapter."""
        trainer.save(self.state, examples)
        save_adapter(trainer.model, trainer.lora, self.path, base_name)

    def save_best(self, trainer: LoRATrainer, base_name: str) -> None:
        folder = self.path / "best"
        folder.mkdir(exist_ok=True)
        save_adapter(trainer.model, trainer.lora, folder, base_name)

    def open_metrics(self, kept: list[StepRecord]) -> TextIO:
        """The metrics file with the lines of these records, open for more."""
        path = self.path / "metrics.jsonl"
        with whole_file(path) as part:
            part.write_text("".join(json.dumps(asdict(record)) + "\n" for record in kept), encoding="utf-8")
        return open(path, "a", encoding="utf-8")

    def read_metrics(self, last_step: int) -> list[StepRecord]:
        """The records up to a step, of the run that is resumed."""
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:last_step]
            records = [StepRecord(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError):
            records = []
        if [record.step for record in records] != list(range(1, last_step + 1)):
            raise ValueError(f"{path}: must have a line for each of the {last_step} steps done")
        return records

    def save_before(self, loss_nats: float, answers: dict[str, list[Answer]]) -> None:
        rows = {name: [asdict(answer) for answer in group] for name, group in answers.items()}
        self.write_json("before.json", {"loss_nats": loss_nats, "answers": rows})

    def read_before(self) -> tuple[float, dict[str, list[Answer]]]:
        """What the run that is resumed knew before it began."""
        path = self.path / "before.json"
        if not path.is_file():
            raise ValueError(f"{path}: a run to resume must have this file, and there is none")
        raw = read_json_object(path)
        try:
            answers = {name: [Answer(**row) for row in rows] for name, rows in raw["answers"].items()}
            return float(raw["loss_nats"]), answers
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path}: is not what a run writes") from None

    def save_curve(self, records: list[StepRecord], trainer: LoRATrainer) -> None:
        save_loss_curve(records, trainer.validation, self.path / "loss.png")

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        with whole_file(self.path / name) as part:
            part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
