"""The lines that describe a run before it starts, and its report after it has ended."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from ...lora import count_parameters
from ...train import StepRecord
from ..training.answers import Evaluation, fraction_right
from ..training.job import PreparedJob, evenly_spaced
from .console import printable


def print_summary(prepared: PreparedJob, console: Console) -> None:
    trained, total = count_parameters(prepared.loaded.model)
    training = prepared.trainer.training
    base = total - trained
    console.print(f"run:       {printable(str(prepared.job.folder))}")
    console.print(f"model:     {prepared.loaded.name}, {base:,} parameters, frozen")
    console.print(f"adapter:   {trained:,} trainable parameters, {trained / base:.2%} of the model's")
    data = prepared.job.data
    if data.is_relative_to(Path.cwd()):
        data = data.relative_to(Path.cwd())
    sizes = f"{len(prepared.train)} training and {prepared.num_valid} validation examples"
    console.print(f"data:      {printable(str(data))}: {sizes}")
    for remark in prepared.remarks:
        console.print(f"           {remark}")
    console.print(f"device:    {mx.default_device()}, computing in {prepared.job.dtype}")
    if prepared.job.ranks:
        console.print(f"ranks:     {prepared.job.ranks.size}, which share out the micro-batches of each step")
    micro = training.grad_accumulation_steps
    batches = f"{micro} x {training.batch_size}" if micro > 1 else str(training.batch_size)
    console.print(f"training:  {training.iters} steps of {batches} examples")


def make_report(
    prepared: PreparedJob, before: Evaluation, after: Evaluation, records: list[StepRecord]
) -> dict[str, Any]:
    validation = prepared.trainer.validation
    best_step, best_nats = min(validation, key=lambda pair: pair[1]) if validation else (None, None)
    return {
        "model": prepared.loaded.name,
        "num_trainable": count_parameters(prepared.loaded.model)[0],
        "iters": prepared.trainer.step,
        "train_examples": len(prepared.train),
        "train_examples_evaluated": len(evenly_spaced(prepared.train, prepared.job.eval_examples)),
        "valid_examples": prepared.num_valid,
        "valid_examples_evaluated": len(prepared.valid),
        "loss_first": before.loss_nats,
        "loss_last": after.loss_nats,
        "valid_loss_first": validation[0][1] if validation else None,
        "valid_loss_last": validation[-1][1] if validation else None,
        "valid_loss_best": best_nats,
        "valid_best_step": best_step,
        **{f"{name}_before": fraction_right(answers) for name, answers in before.answers.items()},
        **{f"{name}_after": fraction_right(answers) for name, answers in after.answers.items()},
        "step_seconds_median": statistics.median(record.seconds for record in records),
        "training_seconds": sum(record.seconds for record in records),
        "peak_bytes": records[-1].peak_bytes,
    }
