"""The main job: fine-tune, and show by questions asked before and after what the model has learned."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console

from ...data import evaluation_batches
from ...run.guard import NotFinite
from ...train import StepRecord, evaluate
from ..interrupt import Interrupt, interrupt_requested
from ..screen.console import counted, harmless, working
from ..screen.report import print_answers, with_progress
from ..screen.summary import make_report, print_summary
from .answers import Exam, ask
from .job import Job, Prepared, prepare, spread
from .stops import way_on


def finetune(job: Job, console: Console) -> dict[str, Any]:
    """Read, examine, train, save, examine again; the report that is also written to `report.json`.

    Raises ValueError for a wrong input before anything is written, and for a model whose loss is no number;
    NotFinite, the last good state saved; Stopped, everything saved. A note says with which command to go on.
    """
    with working("reading model and data", console):
        prepared = prepare(job)
    print_summary(prepared, console)
    before, records = begin_or_go_on(prepared, console)
    with way_on(prepared):
        with interrupt_requested() as interrupt:
            try:
                fit(prepared, records, console, interrupt)
                save(prepared, records, console)
            except NotFinite:
                save(prepared, records[: prepared.trainer.step], console)
                raise
            except BrokenPipeError:  # nobody reads what is printed
                prepared.folder.save(prepared.trainer, prepared.train, prepared.base_name)
                if interrupt.requested is None:
                    raise
        after = examine(prepared, console, "after")
        report = make_report(prepared, before, after, records)
        prepared.folder.write_json("report.json", report)
        prepared.folder.finish()
    saved = f"report.json saved in {harmless(str(job.folder))}"
    try:
        print_answers(before.answers, after.answers, console)
    except KeyboardInterrupt as stop:
        stop.add_note(saved)
        raise
    console.print(saved)
    return report


def begin_or_go_on(prepared: Prepared, console: Console) -> tuple[Exam, list[StepRecord]]:
    """What the model knew before the run, and the records of the steps done."""
    job, folder, step = prepared.job, prepared.folder, prepared.trainer.step
    if not job.resume:
        before = examine(prepared, console, "before")
        identity = prepared.trainer.identity(prepared.train)
        with way_on(prepared):
            folder.begin(job.settings, identity, before)
        return before, []
    with way_on(prepared):
        folder.go_on(job.settings)
        console.print(f"resumed:   {harmless(str(folder.path))}, after step {step}")
        for change in folder.changed_programs():
            console.print(f"           not to the bit: {change}")
        known, records = folder.read_before(step), folder.read_metrics(step)
        if known is None:  # stopped in the middle of its beginning
            known = examine(prepared, console, "before")
            folder.save_before(known)
        return known, records


def save(prepared: Prepared, records: list[StepRecord], console: Console) -> None:
    folder, trainer = prepared.folder, prepared.trainer
    folder.save(trainer, prepared.train, prepared.base_name)
    folder.save_curve(records, trainer)
    console.print(
        f"step {trainer.step}: adapter, training state and loss.png saved in {harmless(str(folder.path))}"
    )


def examine(prepared: Prepared, console: Console, when: str) -> Exam:
    """The loss over training examples and the answers to all questions."""
    examples = spread(prepared.train, prepared.job.eval_examples)
    size = prepared.trainer.training.batch_size
    batches = counted(evaluation_batches(examples, size), -(-len(examples) // size), "evaluating", console)
    loss_nats, _ = evaluate(prepared.loaded.model, batches)
    if not math.isfinite(loss_nats):
        raise ValueError(f"the loss over the training set {when} training is not a finite number")
    whole = len(examples) == len(prepared.train)
    of = "the training set" if whole else f"{len(examples)} of {len(prepared.train)} training examples"
    console.print(f"loss over {of} {when} training: {loss_nats:.4f} nats per target token")
    together = [c for questions in prepared.questions.values() for c in questions]
    if together:
        console.print(f"asking {len(together)} questions")
    answers = iter(ask(prepared.loaded.model, prepared.loaded.tokenizer, together, console))
    return Exam(loss_nats, {n: [next(answers) for _ in cs] for n, cs in prepared.questions.items()})


def fit(prepared: Prepared, records: list[StepRecord], console: Console, interrupt: Interrupt) -> None:
    """Train to the end, to Ctrl-C or until validation has not improved for long; adds to the records."""
    job, trainer, folder = prepared.job, prepared.trainer, prepared.folder
    validate_where_due(prepared, console)  # also what a stop has prevented
    if is_exhausted(prepared, console):
        return
    with folder.open_metrics(records) as metrics:
        steps = recorded(trainer.fit(prepared.train), records, metrics)
        for record in with_progress(steps, trainer.step, trainer.training.iters, console):
            if interrupt.requested is not None:
                break
            validate_where_due(prepared, console)
            if record.step % job.save_every == 0:
                os.fsync(metrics.fileno())
                folder.save(trainer, prepared.train, prepared.base_name)
            if is_exhausted(prepared, console):
                break
        os.fsync(metrics.fileno())
        folder.require_metrics(metrics)


def recorded(steps: Iterable[StepRecord], records: list[StepRecord], metrics: TextIO) -> Iterator[StepRecord]:
    """The same records, kept and written down as they pass."""
    for record in steps:
        records.append(record)
        metrics.write(json.dumps(asdict(record)) + "\n")
        metrics.flush()
        yield record


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
