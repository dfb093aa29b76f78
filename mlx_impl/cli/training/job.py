"""What `train` was asked for, and all that it needs: read, checked and in place before it writes anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...batching import updates_an_epoch
from ...config import LoRAConfig, TrainConfig
from ...data import Example, num_inputs
from ...disk.places import require_apart
from ...files.adapters import load_adapter
from ...files.checkpoint import LoadedModel, load_model
from ...files.precision import to_dtype
from ...run.memory_check import require_memory
from ...run.state import digest_of_examples, require_same
from ...run.trainer import LoRATrainer
from ...text.examples import encode_file
from ...text.rows import Conversation, read_conversations
from . import manifest
from .answers import require_memory_to_ask
from .run_folder import RunFolder

# Which file's questions are reported under which name.
QUESTION_FILES = {"trained": "train.jsonl", "unseen": "test.jsonl", "control": "control.jsonl"}


@dataclass(frozen=True)
class Job:
    """Everything that `train` was asked for."""

    model: str | None
    dequantize: bool
    dtype: str  # that the model computes in
    data: Path
    folder: Path  # where adapter, metrics and report go
    resume: bool  # go on with the run in that folder
    init_adapter: Path | None
    config: Path | None  # that settings were read from
    lora: LoRAConfig | None  # None: as the initial adapter has it
    training: dict[str, Any]  # the fields of TrainConfig but iters
    iters: int | None  # None: as many as the epochs take
    epochs: int
    targets: str  # what is trained: completion, assistant or all
    max_seq_length: int
    steps_per_eval: int
    save_every: int
    patience: int  # validations without a new best after which to stop; 0: never
    num_questions: int | None
    eval_examples: int  # of training and of validation that the loss is computed over; -1: all
    compiled: bool | None
    settings: dict[str, Any]  # all of this again, as --config reads it
    blas: str | None = None  # as it was given


@dataclass(frozen=True)
class Prepared:
    """The job with everything read, checked and in place; nothing is written yet."""

    job: Job
    loaded: LoadedModel
    folder: RunFolder
    trainer: LoRATrainer
    train: list[Example]
    valid: list[Example]  # those that are evaluated
    num_valid: int  # of all
    questions: dict[str, list[Conversation]]  # by the names of QUESTION_FILES
    remarks: list[str]  # what was cut, and what was left out

    @property
    def base_name(self) -> str:
        """What the adapter says that it belongs to."""
        return str(self.job.model or self.loaded.name)


def prepare(job: Job) -> Prepared:
    """Read everything and check it, the cheap things first."""
    to_dtype(job.dtype)
    folder = RunFolder(job.folder)
    if not job.resume:
        require_apart_from_inputs(job)
    train, valid, questions = read_data(job)
    if job.patience and not valid:
        raise ValueError(f"--patience needs validation data, and {job.data} has no valid.jsonl")
    train_config(job, [job.max_seq_length] * len(train))  # its numbers, before a model is loaded
    loaded = load_model(job.model, job.dequantize, job.dtype)
    encoded, valid_encoded = (
        encode_file(loaded.tokenizer, conversations, job.targets, job.max_seq_length)
        for conversations in (train, valid)
    )
    examples, valid_examples = encoded.examples, spread(valid_encoded.examples, job.eval_examples)
    training = train_config(job, [num_inputs(example) for example in examples])
    lora = job.lora
    if job.init_adapter is not None:
        lora = load_adapter(loaded.model, job.init_adapter)
    assert lora is not None
    trainer = LoRATrainer(loaded.model, lora, training, job.compiled)
    trainer.resume_identity = {
        "eval_examples": job.eval_examples,
        "the validation data": digest_of_examples(valid_examples),
        "the questions": {name: [c.question for c in cs] for name, cs in questions.items()},
        "steps_per_eval": job.steps_per_eval,
        "patience": job.patience,
    }
    if job.resume:
        load_state_of(folder, trainer, examples)
    remarks = encoded.remarks("training") + valid_encoded.remarks("validation")
    remarks += require_memory(trainer, examples, spread(examples, job.eval_examples), valid_examples)
    remarks += require_memory_to_ask(loaded, [c for asked in questions.values() for c in asked])
    num_valid = len(valid_encoded.examples)
    return Prepared(job, loaded, folder, trainer, examples, valid_examples, num_valid, questions, remarks)


def require_apart_from_inputs(job: Job) -> None:
    """ValueError where the run's folder is, contains or lies in something that is read."""
    inputs = {"data": job.data, "initial adapter": job.init_adapter, "--config file": job.config}
    if job.model is not None and Path(job.model).exists():
        inputs["model"] = Path(job.model)
    given = {name: path for name, path in inputs.items() if path is not None}
    for name, path in list(given.items()):  # a folder may be made of links to files in other places
        links = [file for file in path.iterdir() if file.is_symlink()] if path.is_dir() else []
        given |= {f"{name}'s file {file.name}": file.resolve() for file in links}
    require_apart(job.folder, given)


def load_state_of(folder: RunFolder, trainer: LoRATrainer, examples: list[Example]) -> None:
    """From the last save, or from the beginning where the run was stopped before the first."""
    begun = manifest.read(folder.path)
    require_same(folder.path, begun.identity, trainer.identity(examples))
    if folder.state.exists() or (folder.path / "adapter_model.safetensors").exists():
        trainer.resume(folder.state, examples)


def spread(examples: list[Example], most: int) -> list[Example]:
    """At most so many, evenly spread over all; -1: all."""
    if most == -1 or len(examples) <= most:
        return examples
    return [examples[i * len(examples) // most] for i in range(most)]


def read_data(job: Job) -> tuple[list[Conversation], list[Conversation], dict[str, list[Conversation]]]:
    """The training and the validation conversations, and the questions that have answers."""

    def optional(name: str) -> list[Conversation]:
        path = job.data / name
        return read_conversations(path) if path.exists() else []

    train = read_conversations(job.data / "train.jsonl")
    files = {name: optional(file) for name, file in QUESTION_FILES.items()}
    judged = {n: [c for c in cs if c.answer is not None][: job.num_questions] for n, cs in files.items()}
    return train, optional("valid.jsonl"), {name: asked for name, asked in judged.items() if asked}


def train_config(job: Job, lengths: list[int]) -> TrainConfig:
    """As many updates as were asked for, or as the epochs take with examples of these lengths."""
    if job.iters is not None:
        return TrainConfig(iters=job.iters, **job.training)
    if job.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {job.epochs}")
    an_epoch = updates_an_epoch(lengths, TrainConfig(iters=1, **{**job.training, "warmup_steps": 0}))
    return TrainConfig(iters=job.epochs * an_epoch, **job.training)
