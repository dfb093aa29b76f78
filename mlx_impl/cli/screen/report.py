"""Progress of a training run, and tables of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ...machine.memory_limits import format_bytes
from ...train import StepRecord
from ..training.answers import Answer, are_judged, fraction_right
from .console import Item, Watch, log_progress, printable

STEPS_PER_LINE = 10  # where there is no progress bar
EXAMPLES_SHOWN = 4  # questions of each group whose answers are printed
SHOWN_CHARACTERS = 300  # of a question or an answer in the table; report.html has it all
VERDICT_COLORS = {"right": "green", "wrong": "red", "cut": "yellow"}


def describe_step(record: StepRecord) -> str:
    return (
        f"loss {record.loss_nats:.3f}  {record.num_tokens / max(record.seconds, 1e-9):5.0f} tokens/s  "
        f"{format_bytes(record.peak_bytes)}"
    )


def training_progress(console: Console) -> Progress:
    """To enter before training: on a terminal a bar for the steps, and one for what comes between them."""
    columns = (
        TextColumn("{task.fields[what]}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_interactive)


def show_training(
    records: Iterable[StepRecord], done: int, num_steps: int, progress: Progress
) -> Iterator[StepRecord]:
    """The same records; a terminal shows a progress bar, anything else a line every STEPS_PER_LINE steps."""
    task = progress.add_task("the first step takes longest", total=num_steps, completed=done, what="step")
    console, seconds = progress.console, 0.0
    for record in records:
        seconds += record.seconds
        progress.update(task, advance=1, description=describe_step(record))
        if not console.is_interactive and record.step % STEPS_PER_LINE in (0, 1):
            left = (num_steps - record.step) * seconds / (record.step - done)
            console.print(f"step {record.step}/{num_steps}  {describe_step(record)}  {left:.0f} s left")
        yield record


def watch_between_steps(progress: Progress) -> Watch:
    """`show_progress` for the time in which the bar of the steps is on the screen."""

    def watch(items: Iterable[Item], num_items: int, text: str) -> Iterable[Item]:
        if not progress.console.is_interactive:
            yield from log_progress(items, num_items, text, progress.console)
            return
        task = progress.add_task("", total=num_items, what=text)
        try:
            for item in items:
                yield item
                progress.advance(task)
        finally:
            progress.remove_task(task)

    return watch


def print_answers(before: dict[str, list[Answer]], after: dict[str, list[Answer]], console: Console) -> None:
    """Print how many answers are right, then a few questions of each group with both answers."""
    judged = [name for name in before if are_judged(before[name])]
    if judged:
        console.print(answers_table({name: before[name] for name in judged}, after))
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
        table.add_row(shortened(printable(old.question)), marked_answer(old), marked_answer(new))
    return table


def marked_answer(answer: Answer) -> Text:
    """The verdict and the answer, which ends in `...` where it was cut."""
    mark = Text(answer.verdict, VERDICT_COLORS.get(answer.verdict, ""))
    text = shortened(printable(answer.text) + (" ..." if answer.is_cut else ""))
    return Text.assemble(mark, f": {text}") if answer.is_judged else Text(text)


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
