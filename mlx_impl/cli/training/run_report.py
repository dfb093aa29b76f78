"""`report.json`: what a finished run did, with all that is needed to understand and to repeat it."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...lora import count_parameters
from ...machine.device import device_name
from ...train import StepRecord
from . import manifest
from .answers import Answer, Evaluation, are_judged, fraction_right
from .evaluation import perplexity
from .job import PreparedJob
from .next_commands import repeat_command
from .samples import evenly_spaced


def make_report(
    prepared: PreparedJob,
    before: Evaluation,
    after: Evaluation,
    records: Sequence[StepRecord],
    test: dict[str, Any],
) -> dict[str, Any]:
    """All facts of the run as JSON values. What depends on time and place is under `run`."""
    judged = {name: answers for name, answers in before.answers.items() if are_judged(answers)}
    return {
        **sizes(prepared),
        "loss_first": before.loss_nats,
        "loss_last": after.loss_nats,
        **validation_results(prepared.trainer.validation),
        **test,
        **{f"{name}_before": fraction_right(answers) for name, answers in judged.items()},
        **{f"{name}_after": fraction_right(after.answers[name]) for name in judged},
        "max_answer_tokens": prepared.asked.max_tokens,
        "answers": {name: answer_pairs(before.answers[name], after.answers[name]) for name in before.answers},
        "remarks": prepared.remarks,
        "step_seconds_median": statistics.median(record.seconds for record in records),
        "training_seconds": sum(record.seconds for record in records),
        "peak_bytes": records[-1].peak_bytes,
        "run": run_facts(prepared),
    }


def sizes(prepared: PreparedJob) -> dict[str, Any]:
    """The model, and how many weights, updates and examples."""
    trained, total = count_parameters(prepared.loaded.model)
    return {
        "model": prepared.loaded.name,
        "num_parameters": total - trained,
        "num_trainable": trained,
        "iters": prepared.trainer.step,
        "train_examples": len(prepared.train),
        "train_examples_evaluated": len(evenly_spaced(prepared.train, prepared.job.eval_examples)),
        "valid_examples": prepared.num_valid,
        "valid_examples_evaluated": len(prepared.valid),
    }


def validation_results(validation: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Loss and perplexity on held-out rows, first, last and best; None without validation data."""
    best_step, best = min(validation, key=lambda pair: pair[1]) if validation else (None, None)
    first, last = (validation[0][1], validation[-1][1]) if validation else (None, None)
    losses = {"first": first, "last": last, "best": best}
    return {
        **{f"valid_loss_{when}": loss for when, loss in losses.items()},
        **{f"valid_perplexity_{when}": perplexity(loss) for when, loss in losses.items()},
        "valid_best_step": best_step,
        "validation": [[step, loss] for step, loss in validation],
    }


def answer_pairs(before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, Any]]:
    """Each question with both answers and their verdicts: right, cut or wrong."""
    return [
        {
            "question": old.question,
            "expected": old.expected,
            "reply": old.reply,
            "before": old.text,
            "after": new.text,
            "verdict_before": old.verdict,
            "verdict_after": new.verdict,
        }
        for old, new in zip(before, after, strict=True)
    ]


def run_facts(prepared: PreparedJob) -> dict[str, Any]:
    """Where, when and with what the run was made, and the command that repeats it."""
    folder = prepared.folder.path.absolute()
    has_manifest = (folder / manifest.NAME).exists()  # another rank than the first may not see the folder
    started = manifest.read(folder) if has_manifest else None
    return {
        "folder": str(folder),
        "data": str(Path(prepared.job.data).absolute()),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": started.settings if started else prepared.job.settings,
        "versions": {**(started.versions if started else {}), "Python": platform.python_version()},
        "device": device_name(),
        "machine": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "repeat": repeat_command(prepared),
    }
