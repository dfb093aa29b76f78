"""The table of `inspect --fit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from ...machine.memory_limits import format_bytes
from ...run.fit import BITS, GROUP_SIZES, WHOLE_BITS
from .console import printable


def print_fit(result: dict[str, Any], console: Console) -> None:
    console.print(f"model:  {printable(result['model'])}, {result['num_weights']:,} weights")
    console.print(f"memory: {format_bytes(result['memory_bytes'])} ({result['limit']})")
    adapter = f"adapter of rank {result['rank']} on all linears"
    console.print(f"device: {result['device']}; {adapter}; every token a target")
    console.print(table_of(result["settings"]))
    console.print("longest row: in tokens, as a batch of one row")
    console.print(f"--batch-size: the largest for rows of {counted(result['tokens'])} (--max-seq-length)")
    for note in notes_of(result):
        console.print(note)
    console.print(f"estimates, with {result['margin_percent']}% added for their error")


def table_of(settings: list[dict[str, Any]]) -> Table:
    columns = ("weights", "--dtype", "--grad-checkpoint", "needs at least", "longest row", "--batch-size")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in settings:
        fits = (f"{row['longest_row']:,}", f"{row['largest_batch']:,}")
        table.add_row(
            f"{row['bits']} bits",
            row["dtype"],
            "yes" if row["grad_checkpoint"] else "no",
            format_bytes(row["least_bytes"]),
            *(fits if row["longest_row"] else ("does not fit", "-")),
        )
    return table


def notes_of(result: dict[str, Any]) -> Iterator[str]:
    """Of what the table leaves out, and of rows that are longer than the model can read."""
    tokens, most = result["tokens"], result["max_tokens"]
    if all(row["bits"] in WHOLE_BITS for row in result["settings"]):
        yield f"{BITS} bits are left out: not every width of the model is a multiple of {min(GROUP_SIZES)}"
    if most is not None and tokens > most:
        yield f"the model was made for rows of at most {counted(most)}, --max-seq-length is {tokens:,}"


def counted(tokens: int) -> str:
    return f"{tokens:,} token{'' if tokens == 1 else 's'}"
