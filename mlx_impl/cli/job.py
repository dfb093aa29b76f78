"""What `train` was asked for, and all that it needs: read, checked and in place before it writes anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import load_adapter
from ..checkpoint import LoadedModel, load_model
from ..config import LoRAConfig, TrainConfig
from ..data import Conversation, Example, read_conversations
from ..state import digest_of_examples
from ..tokenizer import encode_all
from ..trainer import LoRATrainer
from .run_folder import RunFolder

# Which file's questions are reported under which name.
QUESTION_FILES = {"trained": "train.jsonl", "unseen": "test.jsonl", "control": "control.jsonl"}


@dataclass(frozen=True)
class Job:
    """Everything that `train` was asked for."""

    model: str | None
    dequantize: bool
    data: Path
    folder: Path  # where adapter, metrics and report go
    resume: bool  # go on with the run in that folder
    init_adapter: Path | None
    lora: LoRAConfig | None  # None: as the initial adapter has it
    training: dict[str, Any]  # the fields of TrainConfig but iters
    iters: int | None  # None: as many as the epochs take
    epochs: int
    mask_prompt: bool
    max_seq_length: int
    steps_per_eval: int
    save_every: int
    patience: int  # validations without a new best after which to stop; 0: never
    num_questions: int | None
    compiled: bool | None
    settings: dict[str, Any]  # all of this again, as --config reads it


@dataclass(frozen=True)
class Prepared:
    """The job with everything read, checked and in place; nothing is written yet."""

    job: Job
    loaded: LoadedModel
    folder: RunFolder
    trainer: LoRATrainer
    train: list[Example]
    valid: list[Example]
    questions: dict[str, list[Conversation]]  # by the names of QUESTION_FILES

    @property
    def base_name(self) -> str:
        """What the adapter says that it belongs to."""
        return str(self.job.model or self.loaded.name)


def prepare(job: Job) -> Prepared:
    """Read everything and check it, the cheap things first."""
    folder = RunFolder(job.folder)
    if not job.resume:
        folder.require_no_unfinished_run()
    train, valid, questions = read_data(job)
    if job.patience and not valid:
        raise ValueError(f"--patience needs validation data, and {job.data} has no valid.jsonl")
    training = train_config(job, len(train))
    loaded = load_model(job.model, job.dequantize)
    examples, valid_examples = (
        encode_all(loaded.tokenizer, conversations, job.mask_prompt, job.max_seq_length)
        for conversations in (train, valid)
    )
    lora = job.lora
    if job.init_adapter is not None:
        lora = load_adapter(loaded.model, job.init_adapter)
    assert lora is not None
    trainer = LoRATrainer(loaded.model, lora, training, job.compiled)
    trainer.belongs_to = {
        "the validation data": digest_of_examples(valid_examples),
        "the questions": {name: [c.messages[-2]["content"] for c in cs] for name, cs in questions.items()},
        "steps_per_eval": job.steps_per_eval,
        "patience": job.patience,
    }
    if job.resume:
        if folder.report.exists():
            raise ValueError(f"{folder.path}: the run to resume must be unfinished, and has its report")
        trainer.resume(folder.state, examples)
    return Prepared(job, loaded, folder, trainer, examples, valid_examples, questions)


def read_data(job: Job) -> tuple[list[Conversation], list[Conversation], dict[str, list[Conversation]]]:
    """The training and the validation conversations, and the questions that have answers."""

    def optional(name: str) -> list[Conversation]:
        path = job.data / name
        return read_conversations(path) if path.exists() else []

    train = read_conversations(job.data / "train.jsonl")
    files = {name: optional(file) for name, file in QUESTION_FILES.items()}
    judged = {n: [c for c in cs if c.answer is not None][: job.num_questions] for n, cs in files.items()}
    return train, optional("valid.jsonl"), {name: asked for name, asked in judged.items() if asked}


def train_config(job: Job, num_examples: int) -> TrainConfig:
    if job.iters is not None:
        return TrainConfig(iters=job.iters, **job.training)
    if job.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {job.epochs}")
    examples_a_step = job.training["batch_size"] * job.training["grad_accumulation_steps"]
    return TrainConfig(iters=job.epochs * -(-num_examples // examples_a_step), **job.training)
