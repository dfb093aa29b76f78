"""The table of `inspect --fit`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ...machine.memory_limits import format_bytes
from .console import printable


def print_fit(result: dict[str, Any], console: Console) -> None:
    console.print(f"model:  {printable(result['model'])}, {result['num_weights']:,} weights")
    console.print(f"memory: {format_bytes(result['memory_bytes'])} ({result['limit']})")
    console.print(f"device: {result['device']}; rank {result['rank']} on all linears; every token a target")
    columns = ("weights", "--dtype", "--grad-checkpoint", "least need", "longest row", "--batch-size")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in result["settings"]:
        fits = (f"{row['longest_row']:,}", f"{row['largest_batch']:,}")
        table.add_row(
            f"{row['bits']} bits",
            row["dtype"],
            "yes" if row["grad_checkpoint"] else "no",
            format_bytes(row["least_bytes"]),
            *(fits if row["longest_row"] else ("does not fit", "-")),
        )
    console.print(table)
    tokens, most = result["tokens"], result["max_tokens"]
    console.print("longest row: the most tokens of a row that is a batch by itself")
    console.print(f"--batch-size: the most rows of up to {tokens:,} tokens (--max-seq-length)")
    if most is not None and tokens > most:
        console.print(f"the model was made for rows of at most {most} tokens, --max-seq-length is {tokens}")
    console.print(f"estimates, {result['margin_percent']}% added because they may be too low by so much")
