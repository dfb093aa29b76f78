"""The lines that describe a run before it starts."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ...lora import count_parameters
from ...machine.device import device_name
from ..shell_command import path_argument
from ..training.job import Job, PreparedJob
from ..training.resume_hint import train_command
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
    console.print(f"device:    {device_name()}, computing in {prepared.job.dtype}")
    for line in lines_on_ranks(prepared.job):
        console.print(line)
    micro = training.grad_accumulation_steps
    batches = f"{micro} x {training.batch_size}" if micro > 1 else str(training.batch_size)
    console.print(f"training:  {training.iters} steps of {batches} examples")


def lines_on_ranks(job: Job) -> list[str]:
    """How the ranks add up. After Ctrl-C mlx.launch shows nothing that a rank prints: it is said before."""
    if job.ranks:
        order = "" if job.ranks.in_order else ", sums in any order"
        resume = train_command(job, "--resume", path_argument(job.folder))
        return [
            f"ranks:     {job.ranks.size}, which share out the micro-batches of each step{order}",
            f"           after Ctrl-C resume with: {printable(resume)}",
        ]
    if job.settings.get("ordered_sums", True):
        return []
    return ["ranks:     1, which adds up in order: --no-ordered-sums is for several, with --distributed"]
