"""`train --distributed`: this process is one of the ranks. Rank 0 alone writes the run's folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO

from ...data import Example
from ...run.ranks import Ranks
from ...run.trainer import LoRATrainer
from ...train import StepRecord
from ..signals import StopRequest
from .run_folder import RunFolder


class ReadOnlyFolder(RunFolder):
    """The run's folder on all ranks but the first: read as any, never written."""

    def start(self, *_: Any) -> None: ...
    def save_missing_config(self, *_: Any) -> None: ...
    def save_best(self, *_: Any) -> None: ...
    def save_before(self, *_: Any) -> None: ...
    def save_curve(self, *_: Any) -> None: ...
    def write_text(self, *_: Any) -> None: ...
    def require_metrics(self, *_: Any) -> None: ...
    def finish(self) -> None: ...

    def save(self, trainer: LoRATrainer, examples: Sequence[Example], base_name: str) -> None:
        trainer.save(self.state, examples)  # computes its part of the check, and waits until rank 0 has saved

    def open_metrics(self, kept: list[StepRecord]) -> TextIO:
        return tempfile.TemporaryFile("w", encoding="utf-8")


@contextmanager
def shared_folder(ranks: Ranks, reserved: AbstractContextManager[Path]) -> Iterator[Path]:
    """Within the block rank 0 holds the reserved folder; the others are told its path."""
    if ranks.rank:
        yield Path(ranks.gather_objects("")[0])
        return
    with reserved as path:
        ranks.gather_objects(str(path))
        yield path


def agree_to_stop(ranks: Ranks | None, request: StopRequest) -> bool:
    """Whether a signal has asked any of the ranks to stop: all stop after the same update."""
    number = request.signal_number or 0
    if ranks is not None:
        number = ranks.largest(number)
    if number:
        request.signal_number = number
    return number > 0
