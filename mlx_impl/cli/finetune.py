"""The main job: fine-tune, and show by questions asked before and after what the model has learned."""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from ..guard import NotFinite
from ..lora import count_parameters
from ..train import StepRecord
from .answers import Answer, ask, share_right
from .console import working
from .interrupt import Interrupt, interrupt_requested
from .job import Job, Prepared, prepare
from .report import print_answers, with_progress


@dataclass(frozen=True)
class Exam:
    """What the model knows at one time."""

    loss_nats: float  # mean over the targets of the whole training set
    answers: dict[str, list[Answer]]


def finetune(job: Job, console: Console) -> dict[str, Any]:
    """Read, examine, train, save, examine again; the report that is also written to `report.json`.

    Raises ValueError for a wrong input before anything is written, and for a model whose loss is no number;
    NotFinite, the last good state saved; after Ctrl-C KeyboardInterrupt, everything saved.
    """
    with working("reading model and data", console):
        prepared = prepare(job)
    before, records = go_on(prepared, console) if job.resume else begin(prepared, console)
    with interrupt_requested() as interrupt:
        try:
            fit(prepared, records, console, interrupt)
            save(prepared, records, console)
        except NotFinite:
            save(prepared, records[: prepared.trainer.step], console)
            raise
    after = examine(prepared, console, "after")
    report = make_report(prepared, before, after, records)
    prepared.folder.write_json("report.json", report)
    print_answers(before.answers, after.answers, console)
    console.print(f"report.json saved in {job.folder}")
    return report


def begin(prepared: Prepared, console: Console) -> tuple[Exam, list[StepRecord]]:
    """A new run: what the model knows now, and no record yet."""
    prepared.folder.begin()
    prepared.folder.save_config(prepared.job.settings)
    print_summary(prepared, console)
    before = examine(prepared, console, "before")
    prepared.folder.save_before(before.loss_nats, before.answers)
    return before, []


def go_on(prepared: Prepared, console: Console) -> tuple[Exam, list[StepRecord]]:
    """A run that was stopped: what it knew before, and its records."""
    folder, step = prepared.folder, prepared.trainer.step
    before, records = Exam(*folder.read_before()), folder.read_metrics(step)
    print_summary(prepared, console)
    console.print(f"resumed:   {folder.path}, after step {step}")
    return before, records


def save(prepared: Prepared, records: list[StepRecord], console: Console) -> None:
    folder, trainer = prepared.folder, prepared.trainer
    folder.save(trainer, prepared.train, prepared.base_name)
    folder.save_curve(records, trainer)
    console.print(f"step {trainer.step}: adapter, training state and loss.png saved in {folder.path}")


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
    for remark in prepared.remarks:
        console.print(f"           {remark}")
    console.print(f"device:    {mx.default_device()}, computing in {prepared.job.dtype}")
    micro = training.grad_accumulation_steps
    batches = f"{micro} x {training.batch_size}" if micro > 1 else str(training.batch_size)
    console.print(f"training:  {training.iters} steps of {batches} examples")


def examine(prepared: Prepared, console: Console, when: str) -> Exam:
    """The loss over the training set and the answers to all questions."""
    with working("evaluating", console):
        loss_nats = prepared.trainer.evaluate(prepared.train)
    if not math.isfinite(loss_nats):
        raise ValueError(f"the loss over the training set {when} training is not a finite number")
    console.print(f"loss over the training set {when} training: {loss_nats:.4f} nats per target token")
    together = [c for questions in prepared.questions.values() for c in questions]
    if together:
        console.print(f"asking {len(together)} questions")
    with working("reading the answers", console):
        answers = iter(ask(prepared.loaded.model, prepared.loaded.tokenizer, together))
    return Exam(loss_nats, {n: [next(answers) for _ in cs] for n, cs in prepared.questions.items()})


def fit(prepared: Prepared, records: list[StepRecord], console: Console, interrupt: Interrupt) -> None:
    """Train to the end, to Ctrl-C or until validation has not improved for long; adds to the records."""
    job, trainer, folder = prepared.job, prepared.trainer, prepared.folder
    validate_where_due(prepared, console)  # also what a stop has prevented
    if is_exhausted(prepared, console):
        return
    steps = trainer.fit(prepared.train)
    with folder.open_metrics(records) as metrics:
        for record in with_progress(steps, trainer.step, trainer.training.iters, console):
            records.append(record)
            metrics.write(json.dumps(asdict(record)) + "\n")
            metrics.flush()
            if interrupt.requested:
                break
            validate_where_due(prepared, console)
            if record.step % job.save_every == 0:
                os.fsync(metrics.fileno())
                folder.save(trainer, prepared.train, prepared.base_name)
            if is_exhausted(prepared, console):
                break


def validate_where_due(prepared: Prepared, console: Console) -> None:
    """The validation loss every few steps and at the end; the adapter kept where it is the best so far."""
    trainer = prepared.trainer
    is_due = trainer.step % prepared.job.steps_per_eval == 0 or trainer.step == trainer.training.iters
    is_done = any(step == trainer.step for step, _ in trainer.validation)
    if prepared.valid and is_due and not is_done:
        loss_nats = trainer.validate(prepared.valid)
        console.print(f"validation loss at step {trainer.step}: {loss_nats:.4f}")
        if trainer.validations_since_best() == 0:
            prepared.folder.save_best(trainer, prepared.base_name)


def is_exhausted(prepared: Prepared, console: Console) -> bool:
    """Whether early stopping was asked for and is due."""
    patience, trainer = prepared.job.patience, prepared.trainer
    is_due = 0 < patience <= trainer.validations_since_best()
    if is_due:
        console.print(f"stopped at step {trainer.step}: {patience} validations without a better loss")
    return is_due


def make_report(prepared: Prepared, before: Exam, after: Exam, records: list[StepRecord]) -> dict[str, Any]:
    validation = prepared.trainer.validation
    best_step, best_nats = min(validation, key=lambda pair: pair[1]) if validation else (None, None)
    return {
        "model": prepared.loaded.name,
        "num_trainable": count_parameters(prepared.loaded.model)[0],
        "iters": prepared.trainer.step,
        "loss_first": before.loss_nats,
        "loss_last": after.loss_nats,
        "valid_loss_first": validation[0][1] if validation else None,
        "valid_loss_last": validation[-1][1] if validation else None,
        "valid_loss_best": best_nats,
        "valid_best_step": best_step,
        **{f"{name}_before": share_right(answers) for name, answers in before.answers.items()},
        **{f"{name}_after": share_right(answers) for name, answers in after.answers.items()},
        "step_seconds_median": statistics.median(record.seconds for record in records),
        "training_seconds": sum(record.seconds for record in records),
        "peak_bytes": records[-1].peak_bytes,
    }
