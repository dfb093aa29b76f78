"""The main job: fine-tune, and show by questions asked before and after what the model has learned."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from .adapters import save_adapter
from .answers import Answer, ask, share_right
from .files import make_run_folder, whole_file
from .interrupt import Interrupt, interrupt_requested
from .job import Job, Prepared, prepare
from .lora import count_parameters
from .report import print_answers, save_loss_curve, with_progress
from .train import StepRecord


@dataclass(frozen=True)
class Exam:
    """What the model knows at one time."""

    loss_nats: float  # mean over the targets of the whole training set
    answers: dict[str, list[Answer]]


def finetune(job: Job, console: Console) -> dict[str, Any]:
    """Read, examine, train, save, examine again; the report that is also written to `report.json`.

    Raises ValueError for a wrong input before anything is written, and for a loss that is not finite; after
    Ctrl-C KeyboardInterrupt, the adapter saved.
    """
    prepared = prepare(job)
    make_run_folder(job.folder)
    print_summary(prepared, console)
    before = examine(prepared, console, "before")
    for old in ("report.json", "metrics.jsonl"):  # of another run
        (job.folder / old).unlink(missing_ok=True)
    with interrupt_requested() as interrupt:
        records, validation = fit(prepared, console, interrupt)
        base_name = str(job.model or prepared.loaded.name)
        save_adapter(prepared.loaded.model, prepared.lora, job.folder, base_name)
        save_loss_curve(records, validation, job.folder / "loss.png")
        console.print(f"step {len(records)}: adapter, metrics.jsonl and loss.png saved in {job.folder}")
    after = examine(prepared, console, "after")
    report = make_report(prepared, before, after, records, validation)
    with whole_file(job.folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_answers(before.answers, after.answers, console)
    console.print(f"report.json saved in {job.folder}")
    return report


def print_summary(prepared: Prepared, console: Console) -> None:
    trained, total = count_parameters(prepared.loaded.model)
    training = prepared.trainer.training
    base = total - trained
    console.print(f"model:     {prepared.loaded.name}, {base:,} parameters, frozen")
    console.print(f"adapter:   {trained:,} trainable parameters, {trained / base:.2%} of the model's")
    data = prepared.job.data
    if data.is_relative_to(Path.cwd()):
        data = data.relative_to(Path.cwd())
    console.print(
        f"data:      {data}: {len(prepared.train)} training and {len(prepared.valid)} validation examples"
    )
    console.print(f"device:    {mx.default_device()}")
    console.print(f"training:  {training.iters} steps of {training.batch_size} examples")


def examine(prepared: Prepared, console: Console, when: str) -> Exam:
    """The loss over the training set and the answers to all questions."""
    loss_nats = prepared.trainer.evaluate(prepared.train)
    if not math.isfinite(loss_nats):
        raise ValueError(f"the loss over the training set {when} training is not a finite number")
    console.print(f"loss over the training set {when} training: {loss_nats:.4f} nats per target token")
    together = [c for questions in prepared.questions.values() for c in questions]
    if together:
        console.print(f"asking {len(together)} questions")
    answers = iter(ask(prepared.loaded.model, prepared.loaded.tokenizer, together))
    return Exam(loss_nats, {n: [next(answers) for _ in cs] for n, cs in prepared.questions.items()})


def fit(
    prepared: Prepared, console: Console, interrupt: Interrupt
) -> tuple[list[StepRecord], list[tuple[int, float]]]:
    """Train to the end or to Ctrl-C; every step's record and every (step, validation loss)."""
    job, trainer = prepared.job, prepared.trainer
    records: list[StepRecord] = []
    validation: list[tuple[int, float]] = []

    def validate(step: int) -> None:
        if prepared.valid and not interrupt.requested:
            validation.append((step, trainer.evaluate(prepared.valid)))
            console.print(f"validation loss at step {step}: {validation[-1][1]:.4f}")

    validate(0)
    iters = trainer.training.iters
    with open(job.folder / "metrics.jsonl", "w", encoding="utf-8") as metrics:
        for record in with_progress(trainer.fit(prepared.train), iters, console):
            if not math.isfinite(record.loss_nats):
                raise ValueError(
                    f"the loss is not a finite number at step {record.step}; lower the learning rate"
                )
            records.append(record)
            metrics.write(json.dumps(asdict(record)) + "\n")
            metrics.flush()
            if record.step % job.steps_per_eval == 0 or record.step == iters:
                validate(record.step)
            if interrupt.requested:
                break
    return records, validation


def make_report(
    prepared: Prepared,
    before: Exam,
    after: Exam,
    records: list[StepRecord],
    validation: list[tuple[int, float]],
) -> dict[str, Any]:
    return {
        "model": prepared.loaded.name,
        "num_trainable": count_parameters(prepared.loaded.model)[0],
        "iters": prepared.trainer.training.iters,
        "loss_first": before.loss_nats,
        "loss_last": after.loss_nats,
        "valid_loss_first": validation[0][1] if validation else None,
        "valid_loss_last": validation[-1][1] if validation else None,
        **{f"{name}_before": share_right(answers) for name, answers in before.answers.items()},
        **{f"{name}_after": share_right(answers) for name, answers in after.answers.items()},
        "step_seconds_median": statistics.median(record.seconds for record in records),
        "training_seconds": sum(record.seconds for record in records),
        "peak_bytes": records[-1].peak_bytes,
    }
