"""Add the command to continue with, as a note, to whatever error ends a run that has started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...disk.output_folder import free_folder
from ...run.guard import NotFinite
from ..settings.flags import TRAIN_DEFAULTS
from ..shell_command import path_argument, shell_command
from .job import Job, PreparedJob


@contextmanager
def resume_hint(prepared: PreparedJob) -> Iterator[None]:
    """Any error that leaves the block gets a note with the command to continue with."""
    folder = path_argument(prepared.job.folder)
    try:
        yield
    except NotFinite as stop:
        rate = min(prepared.trainer.training.learning_rate / 10, TRAIN_DEFAULTS.learning_rate)
        words = ["--config", f"{folder}/config.yaml", "--init-adapter", folder]
        words += ["--learning-rate", f"{rate:g}", "--adapter-path", path_argument(free_folder(Path(folder)))]
        stop.add_note(f"continue at a lower learning rate with: {train_command(prepared.job, *words)}")
        raise
    except (Exception, KeyboardInterrupt) as stop:
        if prepared.folder.has_started():
            stop.add_note(f"resume with: {train_command(prepared.job, '--resume', folder)}")
        raise


def train_command(job: Job, *words: str) -> str:
    blas = [] if job.blas is None else ["--blas", job.blas]
    distributed = ["--distributed"] if job.ranks else []
    return shell_command("train", *words, *blas, *distributed, launched=bool(job.ranks))
