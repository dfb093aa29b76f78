"""A `train` command: its settings, and what has been read for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...batching import updates_an_epoch
from ...config import LoRAConfig, TrainConfig
from ...data import Example
from ...files.checkpoint import LoadedModel
from ...run.ranks import Ranks
from ...run.trainer import LoRATrainer
from ...text.rows import Reading
from ...text.template_choice import TemplateChoice
from .job_data import Asked
from .run_folder import RunFolder

NUM_VALIDATIONS = 10  # about so many a run, where --steps-per-eval does not say how many


@dataclass(frozen=True)
class Job:
    """All settings of a `train` command."""

    model: str | None
    dequantize: bool
    dtype: str
    data: Path
    reading: Reading  # how data files are read
    reasoning: str  # require, inline or template
    template: TemplateChoice  # of the chat template
    folder: Path  # for adapter, metrics and report
    resume: bool  # resume the run in that folder
    init_adapter: Path | None
    config: Path | None  # the settings file
    lora: LoRAConfig | None  # None: that of the initial adapter
    training: dict[str, Any]  # the fields of TrainConfig except iters
    iters: int | None  # None: follows from epochs
    epochs: int
    targets: str  # completion, assistant or all
    max_seq_length: int
    steps_per_eval: int | None  # None: about NUM_VALIDATIONS times a run
    save_every: int
    patience: int  # validations without a new best before early stopping; 0: never stop early
    num_questions: int | None
    max_answer_tokens: int | None  # None: follows from the longest reply of the data
    sample_every: int  # answer the samples every so many steps; 0: never
    test: bool | Path | None  # evaluate at the end on the data's test file (True), on this one, or on none
    report_to: list[str]  # tensorboard, wandb or both
    project_name: str | None  # of wandb
    eval_examples: int  # at most this many training and validation examples are evaluated; -1: all
    compiled: bool | None
    plain: bool  # train without the fast path
    ranks: Ranks | None  # of --distributed
    settings: dict[str, Any]  # the same settings as --config reads them
    blas: str | None = None  # the value of --blas


@dataclass(frozen=True)
class PreparedJob:
    """A job with everything read and checked. Nothing is written yet."""

    job: Job
    loaded: LoadedModel
    folder: RunFolder
    trainer: LoRATrainer
    train: Sequence[Example]
    valid: Sequence[Example]  # only those that are evaluated
    num_valid: int  # of all validation examples
    test: Sequence[Example]  # of --test
    asked: Asked
    remarks: list[str]  # on truncated and skipped examples and on short memory

    @property
    def steps_per_eval(self) -> int:
        """Updates between validations."""
        return steps_per_eval(self.job, self.trainer.training.iters)

    @property
    def base_name(self) -> str:
        """The base model's name, as the adapter's configuration records it."""
        return str(self.job.model or self.loaded.name)


def steps_per_eval(job: Job, iters: int) -> int:
    return job.steps_per_eval or max(1, -(-iters // NUM_VALIDATIONS))


def train_config(job: Job, lengths: list[int]) -> TrainConfig:
    """The TrainConfig with --iters steps, or as many as --epochs takes with examples of these lengths."""
    if job.iters is not None:
        return TrainConfig(iters=job.iters, **job.training)
    if job.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {job.epochs}")
    epoch_updates = updates_an_epoch(lengths, TrainConfig(iters=1, **{**job.training, "warmup_steps": 0}))
    return TrainConfig(iters=job.epochs * epoch_updates, **job.training)
