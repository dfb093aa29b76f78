"""Progress of a training run, and tables of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ...train import StepRecord
from ..training.answers import Answer, fraction_right
from .console import printable

STEPS_PER_LINE = 10  # where there is no progress bar
EXAMPLES_SHOWN = 4  # questions of each group whose answers are printed in full


def describe_step(record: StepRecord) -> str:
    return (
        f"loss {record.loss_nats:.3f}  {record.num_tokens / max(record.seconds, 1e-9):5.0f} tokens/s  "
        f"{record.peak_bytes / 2**30:.2f} GiB"
    )


def show_training(
    records: Iterable[StepRecord], done: int, num_steps: int, console: Console
) -> Iterator[StepRecord]:
    """The same records; a terminal shows a progress bar, anything else a line every STEPS_PER_LINE steps."""
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
            progress.update(task, advance=1, description=describe_step(record))
            if not console.is_interactive and record.step % STEPS_PER_LINE in (0, 1):
                left = (num_steps - record.step) * seconds / (record.step - done)
                console.print(f"step {record.step}/{num_steps}  {describe_step(record)}  {left:.0f} s left")
            yield record


def print_answers(before: dict[str, list[Answer]], after: dict[str, list[Answer]], console: Console) -> None:
    """Print how many answers are right, then a few questions of each group with both answers."""
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
            f"{fraction_right(before[group]):.0%}",
            f"{fraction_right(after[group]):.0%}",
        )
    return table


def examples_table(name: str, before: Sequence[Answer], after: Sequence[Answer]) -> Table:
    """EXAMPLES_SHOWN evenly spaced questions of the group, with both answers."""
    table = Table(f"{name}: question", "answer before", "answer after")
    stride = -(-len(before) // EXAMPLES_SHOWN)
    for old, new in list(zip(before, after, strict=True))[::stride]:
        table.add_row(old.question, marked_answer(old), marked_answer(new))
    return table


def marked_answer(answer: Answer) -> Text:
    mark = Text("right", "green") if answer.is_right else Text("wrong", "red")
    return Text.assemble(mark, f": {printable(answer.text)}")
