"""The whole run of `train`: evaluate, fine-tune, save, evaluate again, report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console

from ...run.guard import NotFinite
from ...train import StepRecord
from ..screen.console import StatusLine, Watch, printable, show_status, watch_on
from ..screen.page import report_page
from ..screen.report import print_answers, show_training, training_progress, watch_between_steps
from ..screen.result import print_next, print_result
from ..screen.summary import print_summary
from ..signals import StopRequest, defer_signals
from .answers import Evaluation
from .evaluation import evaluate_model, show_samples, test_result, watched_batches
from .job import Job, PreparedJob
from .next_commands import next_commands
from .on_ranks import agree_to_stop
from .prepare import prepare, require_same_on_all_ranks
from .resume_hint import resume_hint
from .run_report import make_report
from .trackers import Track, open_trackers, values_of


def finetune(job: Job, console: Console) -> dict[str, Any]:
    """Run the job and return the report, which is also written to `report.json`.

    Raises ValueError, before anything is written, for a wrong input or a model whose loss is not finite;
    NotFinite after saving the last good state; StoppedBySignal after saving everything. A note on the
    exception is the command to continue with.
    """
    with show_status("reading the data", console) as status:
        prepared = prepare(job, StatusLine(status, console))
        require_same_on_all_ranks(prepared)
    print_summary(prepared, console)
    before, records = start_or_resume(prepared, console)
    with resume_hint(prepared):
        with defer_signals() as stop_request:
            fit_and_save(prepared, records, console, stop_request)
        after = evaluate_model(prepared, console, "after")
        report = make_report(prepared, before, after, records, test_result(prepared, console))
        write_report(prepared, report, records)
    saved = f"report.json and report.html saved in {printable(str(job.folder))}"
    try:
        print_answers(before.answers, after.answers, console)
        print_result(report, console)
    except KeyboardInterrupt as stop:
        stop.add_note(saved)
        raise
    console.print(saved)
    print_next(next_commands(prepared), console)
    return report


def write_report(prepared: PreparedJob, report: dict[str, Any], records: list[StepRecord]) -> None:
    folder, ranks = prepared.folder, prepared.job.ranks
    folder.write_json("report.json", report)
    folder.write_text("report.html", report_page(report, records))
    folder.finish()
    if ranks:
        ranks.largest(0)  # no rank reports success before rank 0 has written the report


def start_or_resume(prepared: PreparedJob, console: Console) -> tuple[Evaluation, list[StepRecord]]:
    """The evaluation before training, and the records of the steps done so far."""
    job, folder, step = prepared.job, prepared.folder, prepared.trainer.step
    if not job.resume:
        before = evaluate_model(prepared, console, "before")
        identity = prepared.trainer.identity(prepared.train)
        with resume_hint(prepared):
            folder.start(job.settings, identity, before)
        return before, []
    with resume_hint(prepared):
        folder.save_missing_config(job.settings)
        console.print(f"resumed:   {printable(str(folder.path))}, after step {step}")
        for change in [*folder.changed_versions(), *folder.changed_path(job.plain)]:
            console.print(f"           not bit-exact: {change}")
        saved, records = folder.read_before(step), folder.read_metrics(step)
        if saved is None:  # the run was stopped before it had saved its first evaluation
            saved = evaluate_model(prepared, console, "before")
            folder.save_before(saved)
        return saved, records


def fit_and_save(
    prepared: PreparedJob, records: list[StepRecord], console: Console, stop_request: StopRequest
) -> None:
    try:
        fit(prepared, records, console, stop_request)
        save(prepared, records, console)
    except NotFinite:
        save(prepared, records[: prepared.trainer.step], console)
        raise
    except BrokenPipeError:  # the reader of standard output has left
        if prepared.job.ranks:
            raise  # the other ranks do not know, and saving takes them all
        prepared.folder.save(prepared.trainer, prepared.train, prepared.base_name)
        if stop_request.signal_number is None:
            raise


def save(prepared: PreparedJob, records: list[StepRecord], console: Console) -> None:
    folder, trainer = prepared.folder, prepared.trainer
    folder.save(trainer, prepared.train, prepared.base_name)
    folder.save_curve(records, trainer)
    path = printable(str(folder.path))
    console.print(f"step {trainer.step}: adapter, training state and loss.png saved in {path}")


def fit(
    prepared: PreparedJob, records: list[StepRecord], console: Console, stop_request: StopRequest
) -> None:
    """Train to the last step, a request to stop or early stopping; append to the records."""
    job, trainer, folder = prepared.job, prepared.trainer, prepared.folder
    names = job.report_to if job.ranks is None or job.ranks.rank == 0 else []
    with open_trackers(names, folder.path, job.settings, job.project_name, trainer.step) as track:
        # at step 0, or where the run was stopped before it could
        validate_if_due(prepared, console, watch_on(console), track)
        if should_stop_early(prepared, console):
            return
        with folder.open_metrics(records) as metrics, training_progress(console) as progress:
            steps = record_steps(trainer.fit(prepared.train), records, metrics)
            watch = watch_between_steps(progress)
            for record in show_training(steps, trainer.step, trainer.training.iters, progress):
                track(record.step, values_of(record))
                if agree_to_stop(trainer.ranks, stop_request):
                    break
                validate_if_due(prepared, console, watch, track)
                if job.sample_every and record.step % job.sample_every == 0:
                    show_samples(prepared, console, watch)
                if record.step % job.save_every == 0:
                    os.fsync(metrics.fileno())
                    folder.save(trainer, prepared.train, prepared.base_name)
                if should_stop_early(prepared, console):
                    break
            os.fsync(metrics.fileno())
            folder.require_metrics(metrics)


def record_steps(
    steps: Iterable[StepRecord], records: list[StepRecord], metrics: TextIO
) -> Iterator[StepRecord]:
    """The same steps, each appended to the records and to the metrics file."""
    for record in steps:
        records.append(record)
        metrics.write(json.dumps(asdict(record)) + "\n")
        metrics.flush()
        yield record


def validate_if_due(prepared: PreparedJob, console: Console, watch: Watch, track: Track) -> None:
    """Compute the validation loss every --steps-per-eval steps and at the end; save the best adapter."""
    trainer = prepared.trainer
    is_due = trainer.step % prepared.steps_per_eval == 0 or trainer.step == trainer.training.iters
    is_done = any(step == trainer.step for step, _ in trainer.validation)
    if prepared.valid and is_due and not is_done:
        batches = watched_batches(prepared.valid, trainer, "validating", watch)
        loss_nats = trainer.add_validation(trainer.evaluate_batches(batches))
        console.print(f"validation loss at step {trainer.step}: {loss_nats:.4f}")
        track(trainer.step, {"valid/loss": loss_nats})
        if trainer.validations_since_best() == 0:
            prepared.folder.save_best(trainer, prepared.base_name)


def should_stop_early(prepared: PreparedJob, console: Console) -> bool:
    """Whether --patience validations in a row were no better than the best."""
    patience, trainer = prepared.job.patience, prepared.trainer
    is_due = 0 < patience <= trainer.validations_since_best()
    if is_due:
        console.print(f"stopped at step {trainer.step}: {patience} validations without a better loss")
    return is_due
