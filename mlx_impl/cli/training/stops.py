"""Whatever ends a run that has begun, a note on the error says with which command to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...disk.places import free_folder
from ...run.guard import NotFinite
from ..command_line import as_value, command_line
from ..settings.flags import TRAIN_DEFAULTS
from .job import Job, Prepared


@contextmanager
def way_on(prepared: Prepared) -> Iterator[None]:
    """Whatever ends the run within the block is given the command to go on with."""
    folder = as_value(prepared.job.folder)
    try:
        yield
    except NotFinite as stop:
        rate = min(prepared.trainer.training.learning_rate / 10, TRAIN_DEFAULTS.learning_rate)
        words = ["--config", f"{folder}/config.yaml", "--init-adapter", folder]
        words += ["--learning-rate", f"{rate:g}", "--adapter-path", as_value(free_folder(Path(folder)))]
        stop.add_note(f"go on at a lower learning rate with: {train_command(prepared.job, *words)}")
        raise
    except (Exception, KeyboardInterrupt) as stop:
        if prepared.folder.has_begun():
            stop.add_note(f"go on with: {train_command(prepared.job, '--resume', folder)}")
        raise


def train_command(job: Job, *words: str) -> str:
    blas = [] if job.blas is None else ["--blas", job.blas]
    return command_line("train", *words, *blas)
