"""A run as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .flops import utilisation
from .gate import Ratio
from .measure import Run

HEADINGS = ("trainer", "step", "ours / its", "tokens/s", "targets/s", "first step", "peak", "MFU")
BUSY = 0.5  # load above which other programs are using the cores
PIPED_WIDTH = 120  # columns if the output is no terminal


def rows(run: Run) -> list[tuple[str, ...]]:
    """One row per trainer, then the floors. The ratio is ours / theirs with its 95% interval."""
    ours = next(iter(run.results))
    table = [
        (
            result.title,
            shown_seconds(result.step_seconds),
            "" if name == ours else str(run.ratio(ours, name)),
            f"{run.tokens_per_second(name):.0f}",
            f"{run.targets_per_second(name):.0f}",
            shown_seconds(result.first_step_seconds),
            shown_bytes(result.peak.peak_bytes),
            f"{run.mfu(name):.0%}",
        )
        for name, result in run.results.items()
    ]
    floors = {"floor: matmuls only": run.floor_seconds}
    if run.flops.repeated:
        floors["floor, shared prefix once"] = run.floor_seconds_of_distinct
    return [*table, *(floor_row(run, title, seconds) for title, seconds in floors.items())]


def floor_row(run: Run, title: str, seconds: float) -> tuple[str, ...]:
    speeds = (f"{run.work.num_tokens / seconds:.0f}", f"{run.work.num_targets / seconds:.0f}")
    mfu = utilisation(run.flops.total, seconds, run.rate)
    return title, shown_seconds(seconds), "", *speeds, "", "", f"{mfu:.0%}"


def notes(run: Run) -> list[str]:
    """The conditions of the run, in words."""
    work, case = run.work, run.case
    steps = len(next(iter(run.results.values())).seconds)
    distinct = f" ({work.num_distinct} distinct ones that a target depends on)"
    if work.num_distinct == work.num_tokens:
        distinct = ""
    lines = [
        f"case {case.name}: {work.num_positions} positions per step, of them {work.num_tokens} tokens"
        f"{distinct} and {work.num_targets} targets; rank {case.rank}; base in {case.dtype}; "
        f"{steps} interleaved steps",
        f"matmul rate {run.rate / 1e9:.0f} GFLOP/s; {run.flops.total / 1e9:.1f} model GFLOPs per step",
    ]
    if distinct:
        lines.append("MFU and tokens/s count a shared prefix in every row, although ours computes it once")
    if any(row.name in ("peft", "peft-compiled", "pytorch") for row in run.results.values()):
        lines.append("PyTorch does not count bytes on a CPU: its peak is the resident memory of its process")
    if run.load > BUSY:
        lines.append(f"the load was {run.load:.1f} before the run: other programs used the cores")
    return lines


def print_table(run: Run) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right", no_wrap=True)
    for row in rows(run):
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table)
    for line in notes(run):
        console.print(line, style="dim", highlight=False)


def markdown(headings: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (headings, ["---"] * len(headings), *table)]
    return "\n".join(f"| {line} |" for line in lines)


def as_json(run: Run) -> dict[str, Any]:
    sides = {
        name: {
            "step_seconds": result.step_seconds,
            "seconds": result.seconds,
            "first_step_seconds": result.first_step_seconds,
            "first_loss_nats": result.first_loss_nats,
            "tokens_per_second": run.tokens_per_second(name),
            "targets_per_second": run.targets_per_second(name),
            "peak_bytes": result.peak.peak_bytes,
            "active_bytes": result.peak.active_bytes,
            "cache_bytes": result.peak.cache_bytes,
            "mfu": run.mfu(name),
            "blas": result.blas,
        }
        for name, result in run.results.items()
    }
    floor = {
        "seconds": run.floor_seconds,
        "seconds_of_distinct": run.floor_seconds_of_distinct,
        "matmul_flops_per_second": run.rate,
        "flops": run.flops.total,
    }
    return {"case": run.case.name, "load": run.load, "sides": sides, "floor": floor}


def shown_ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def shown_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def shown_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
