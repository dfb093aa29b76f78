"""What a person sees of a run: progress and tables; plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ...train import StepRecord
from ..training.answers import Answer, share_right
from .console import harmless

PLAIN_EVERY = 10  # steps between lines where there is no bar
EXAMPLES_SHOWN = 4  # questions of a group, answered in full


def describe(record: StepRecord) -> str:
    return (
        f"loss {record.loss_nats:.3f}  {record.num_tokens / max(record.seconds, 1e-9):5.0f} tokens/s  "
        f"{record.peak_bytes / 2**30:.2f} GiB"
    )


def with_progress(
    records: Iterable[StepRecord], done: int, num_steps: int, console: Console
) -> Iterator[StepRecord]:
    """The same records, shown as they pass: a bar on a terminal, else a line every few steps."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_interactive) as progress:
        task = progress.add_task("the first step takes longest", total=num_steps, completed=done)
        seconds = 0.0
        for record in records:
            seconds += record.seconds
            progress.update(task, advance=1, description=describe(record))
            if not console.is_interactive and record.step % PLAIN_EVERY in (0, 1):
                left = (num_steps - record.step) * seconds / (record.step - done)
                console.print(f"step {record.step}/{num_steps}  {describe(record)}  {left:.0f} s left")
            yield record


def print_answers(before: dict[str, list[Answer]], after: dict[str, list[Answer]], console: Console) -> None:
    """The shares of right answers, then a few questions of each group with both answers in full."""
    if before:
        console.print(answers_table(before, after))
    for name in before:
        console.print(examples_table(name, before[name], after[name]))


def answers_table(before: dict[str, list[Answer]], after: dict[str, list[Answer]]) -> Table:
    table = Table("questions", "right before", "right after", title="answers", title_justify="left")
    for group in before:
        count = len(before[group])
        table.add_row(
            f"{group} ({count})",
            f"{share_right(before[group]):.0%}",
            f"{share_right(after[group]):.0%}",
        )
    return table


def examples_table(name: str, before: Sequence[Answer], after: Sequence[Answer]) -> Table:
    """A few questions, spread over the group, with both answers in full."""
    table = Table(f"{name}: question", "answer before", "answer after")
    stride = -(-len(before) // EXAMPLES_SHOWN)
    for old, new in list(zip(before, after, strict=True))[::stride]:
        table.add_row(old.question, in_full(old), in_full(new))
    return table


def in_full(answer: Answer) -> Text:
    mark = Text("right", "green") if answer.is_right else Text("wrong", "red")
    return Text.assemble(mark, f": {harmless(answer.text)}")
