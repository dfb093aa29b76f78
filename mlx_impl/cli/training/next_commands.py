"""The commands that a user may want after a run, ready to copy."""

from __future__ import annotations

from pathlib import Path

from ...disk.output_folder import free_folder
from ..shell_command import path_argument, shell_command
from .job import PreparedJob
from .resume_hint import train_command


def next_commands(prepared: PreparedJob) -> dict[str, str]:
    """Commands by what they do, for the better of the last and the best adapter."""
    job, folder = prepared.job, prepared.folder.path
    adapter = path_argument(better_adapter(prepared))
    fused = path_argument(free_folder(folder.with_name(f"{folder.name}-fused")))
    model = [] if job.model is None else ["--model", path_argument(job.model)]
    use = [*model, *(["--dtype", job.dtype] if job.dtype != "float32" else [])]
    blas = [] if job.blas is None else ["--blas", job.blas]
    with_adapter = "--adapter-path", adapter
    commands = {
        "ask it": ["generate", *use, *with_adapter, f"--prompt={question(prepared)}", *blas],
        "chat with it": ["generate", *use, *with_adapter, "--chat", *blas],
        "write it as a model": ["fuse", *model, *with_adapter, "--save-path", fused, *blas],
    }
    if prepared.loaded.tokenizer.template is None:
        del commands["chat with it"]
    return {
        **{what: shell_command(*words) for what, words in commands.items()},
        "repeat the run": repeat_command(prepared),
    }


def better_adapter(prepared: PreparedJob) -> Path:
    """`best/` where a validation before the last step was better than the last, else the run's own folder."""
    folder, validation = prepared.folder.path, prepared.trainer.validation
    best = min(validation, key=lambda pair: pair[1])[0] if validation else prepared.trainer.step
    return folder / "best" if 0 < best < prepared.trainer.step else folder


def question(prepared: PreparedJob) -> str:
    """A short question of the data."""
    asked = [c.question for c in prepared.asked.samples if c.question.isprintable() and len(c.question) < 80]
    return asked[0] if asked else "Who are you?"


def repeat_command(prepared: PreparedJob) -> str:
    """The same run again, in a new folder."""
    folder = prepared.folder.path
    config, again = path_argument(folder / "config.yaml"), path_argument(free_folder(folder))
    return train_command(prepared.job, "--config", config, "--adapter-path", again)
