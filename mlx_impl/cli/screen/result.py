"""The last lines of `train`: what was learned, and the commands to go on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ...machine.memory_limits import format_bytes
from .console import printable


def print_result(report: dict[str, Any], console: Console) -> None:
    """Loss and perplexity before and after, the best step, time and memory."""
    if report["valid_loss_first"] is None:
        console.print("held-out:  none: with valid.jsonl a run shows whether it learns more than its rows")
    else:
        losses, perplexities = change(report, "valid_loss", ".3f"), change(report, "valid_perplexity", ".2f")
        console.print(
            f"held-out:  loss {losses}, perplexity {perplexities} (best: step {report['valid_best_step']})"
        )
    if "test_loss" in report:
        shown = number(report["test_perplexity"])
        console.print(f"test:      loss {report['test_loss']:.4f}, perplexity {shown}")
    verdicts = [row["verdict_after"] for rows in report["answers"].values() for row in rows]
    if cut := verdicts.count("cut"):
        at = f"{cut} of {len(verdicts)} answers at {report['max_answer_tokens']} tokens"
        console.print(f"cut:       {at}; --max-answer-tokens N allows more")
    seconds, peak = report["training_seconds"], format_bytes(report["peak_bytes"])
    console.print(f"time:      {duration(seconds)} of training, peak memory {peak}")


def print_next(commands: Mapping[str, str], console: Console) -> None:
    console.print("next:")
    for what, command in commands.items():
        console.print(f"  # {what}\n  {printable(command)}")


def change(report: dict[str, Any], name: str, form: str) -> str:
    """`2.100 -> 0.300`, the first and the last value."""
    return " -> ".join(number(report[f"{name}_{when}"], form) for when in ("first", "last"))


def number(value: float | None, form: str = ".2f") -> str:
    return "too large" if value is None else format(value, form if abs(value) < 1e5 else ".2e")


def duration(seconds: float) -> str:
    """3.2 s, 4 min 10 s or 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
