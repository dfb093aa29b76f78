"""The main job: fine-tune, and show by questions asked before and after what the model has learned."""

from __future__ import annotations

import json
import os
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from .adapters import load_adapter, save_adapter
from .answers import Answer, ask, share_right
from .checkpoint import LoadedModel, load_model
from .config import LoRAConfig, TrainConfig
from .data import Conversation, Example, read_conversations
from .lora import count_parameters
from .report import answers_table, examples_table, save_loss_curve, with_progress
from .tokenizer import encode_all
from .train import StepRecord
from .trainer import LoRATrainer

# Which file's questions are reported under which name.
QUESTION_FILES = {"trained": "train.jsonl", "unseen": "test.jsonl", "control": "control.jsonl"}
EXAMPLES_SHOWN = 4


@dataclass(frozen=True)
class Job:
    """Everything that `train` was asked for."""

    model: Path | None
    data: Path
    folder: Path  # where adapter, metrics and report go
    init_adapter: Path | None
    lora: LoRAConfig | None  # None: as the initial adapter has it
    iters: int | None  # None: as many as the epochs take
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    weight_decay: float
    seed: int
    mask_prompt: bool
    max_seq_length: int
    steps_per_eval: int
    num_questions: int | None
    compiled: bool | None

    def training(self, num_examples: int) -> TrainConfig:
        if self.iters is None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        return TrainConfig(
            iters=self.epochs * -(-num_examples // self.batch_size) if self.iters is None else self.iters,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Data:
    """The job's conversations, as read."""

    train: list[Conversation]
    valid: list[Conversation]
    questions: dict[str, list[Conversation]]  # by the names of QUESTION_FILES


def finetune(job: Job, console: Console) -> dict[str, Any]:
    """Read, ask, train, save, ask again; the report that is also written to `report.json`."""
    data = read_data(job)
    training = job.training(len(data.train))
    loaded = load_model(job.model)
    train, valid = (
        encode_all(loaded.tokenizer, conversations, job.mask_prompt, job.max_seq_length)
        for conversations in (data.train, data.valid)
    )
    lora = job.lora if job.init_adapter is None else load_adapter(loaded.model, job.init_adapter)
    assert lora is not None
    trainer = LoRATrainer(loaded.model, job.lora, training, job.compiled)
    job.folder.mkdir(parents=True, exist_ok=True)
    print_summary(job, data, loaded, trainer, console)

    before = ask_all(loaded, data, console, "before")
    loss_first = trainer.evaluate(train)
    console.print(f"training loss before: {loss_first:.3f} nats per target token")
    records, validation = fit(job, trainer, train, valid, console)
    save_adapter(loaded.model, lora, job.folder, loaded.name)
    save_loss_curve(records, validation, job.folder / "loss.png")
    console.print(f"adapter, metrics.jsonl and loss.png saved in {job.folder}")
    if len(records) < training.iters:
        console.print(f"stopped after step {len(records)} of {training.iters}")
        raise KeyboardInterrupt
    loss_last = trainer.evaluate(train)
    console.print(f"training loss after: {loss_last:.3f} nats per target token")
    after = ask_all(loaded, data, console, "after")
    print_answers(before, after, console)

    report = {
        "model": loaded.name,
        "num_trainable": count_parameters(loaded.model)[0],
        "iters": training.iters,
        "loss_first": loss_first,
        "loss_last": loss_last,
        "valid_loss_first": validation[0][1] if validation else None,
        "valid_loss_last": validation[-1][1] if validation else None,
        **{f"{name}_before": share_right(answers) for name, answers in before.items()},
        **{f"{name}_after": share_right(answers) for name, answers in after.items()},
        "step_seconds_median": statistics.median(record.seconds for record in records),
        "training_seconds": sum(record.seconds for record in records),
        "peak_bytes": mx.get_peak_memory(),
    }
    write_whole(job.folder / "report.json", json.dumps(report, indent=2) + "\n")
    console.print(f"report.json saved in {job.folder}")
    return report


def read_data(job: Job) -> Data:
    def optional(name: str) -> list[Conversation]:
        path = job.data / name
        return read_conversations(path) if path.exists() else []

    questions = {
        name: [c for c in optional(file) if c.answer is not None][: job.num_questions]
        for name, file in QUESTION_FILES.items()
    }
    return Data(
        train=read_conversations(job.data / "train.jsonl"),
        valid=optional("valid.jsonl"),
        questions={name: asked for name, asked in questions.items() if asked},
    )


def print_summary(job: Job, data: Data, loaded: LoadedModel, trainer: LoRATrainer, console: Console) -> None:
    trained, total = count_parameters(loaded.model)
    console.print(f"model:     {loaded.name}, {total - trained:,} parameters, frozen")
    console.print(
        f"adapter:   {trained:,} trainable parameters, {trained / (total - trained):.2%} of the model's"
    )
    console.print(
        f"data:      {job.data}: {len(data.train)} training and {len(data.valid)} validation examples"
    )
    console.print(f"device:    {mx.default_device()}")
    console.print(f"training:  {trainer.training.iters} steps of {trainer.training.batch_size} examples")


def fit(
    job: Job,
    trainer: LoRATrainer,
    train: list[Example],
    valid: list[Example],
    console: Console,
) -> tuple[list[StepRecord], list[tuple[int, float]]]:
    """Train to the end or to Ctrl-C; every step's record and every (step, validation loss)."""
    records: list[StepRecord] = []
    validation: list[tuple[int, float]] = []

    def validate(step: int) -> None:
        if valid:
            validation.append((step, trainer.evaluate(valid)))
            console.print(f"validation loss at step {step}: {validation[-1][1]:.3f}")

    validate(0)
    iters = trainer.training.iters
    with (
        open(job.folder / "metrics.jsonl", "w", encoding="utf-8") as metrics,
        interrupt_noted() as interrupted,
    ):
        for record in with_progress(trainer.fit(train), iters, console):
            records.append(record)
            metrics.write(json.dumps(asdict(record)) + "\n")
            metrics.flush()
            if interrupted:
                break
            if record.step % job.steps_per_eval == 0 or record.step == iters:
                validate(record.step)
    return records, validation


@contextmanager
def interrupt_noted() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list, so that a step is finished and saved; a second one interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)


def ask_all(loaded: LoadedModel, data: Data, console: Console, when: str) -> dict[str, list[Answer]]:
    num_questions = sum(map(len, data.questions.values()))
    if num_questions:
        console.print(f"asking {num_questions} questions {when} training")
    together = [c for questions in data.questions.values() for c in questions]
    answers = iter(ask(loaded.model, loaded.tokenizer, together))
    return {name: [next(answers) for _ in questions] for name, questions in data.questions.items()}


def print_answers(before: dict[str, list[Answer]], after: dict[str, list[Answer]], console: Console) -> None:
    if not before:
        return
    console.print(answers_table(before, after))
    for name in before:
        console.print(examples_table(name, before[name], after[name], EXAMPLES_SHOWN))


def write_whole(path: Path, text: str) -> None:
    """All of the text under the final name, or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
