"""Tokens a second on short examples, by how they are batched: `python -m benchmarks.short_examples`.

Epochs of 64 examples of 40 to 120 random tokens, the last half of them targets, with as many examples an
update on average: ours in batches of four in random order (plain) or of like length (grouped), and packed
into one row of 320; and mlx-lm, which groups by length, on the grouped batches. Epochs take turns (ABCDDCBA).
Padding is no token. In the first epoch every shape is new, and on a GPU is compiled.
On a GPU: `--case tinyllama`. There the four start together, because most of a start is the compiling of
kernels, one after the other; and each epoch but the first has a few untimed updates before it.
"""

from __future__ import annotations

import argparse
import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory, gettempdir

from .cases import CASES, Case, named_case
from .contestants import named_entry
from .gate import Seconds, ratio_of
from .interleave import interleave
from .table import markdown, shown_bytes, shown_seconds
from .worker import Side, call

LENGTHS = (40, 120)
A_BATCH = 4  # examples
A_ROW = A_BATCH * sum(LENGTHS) // 2  # tokens: as many as a batch has on average
HEADINGS = ("trainer", "tokens/s", "plain / its", "first epoch", "updates", "shapes", "padding", "peak")


@dataclass(frozen=True)
class Epoch:
    updates: int
    shapes: int  # for which ours is compiled
    tokens: int
    positions: int  # with padding


@dataclass(frozen=True)
class Measured:
    first: float  # seconds
    seconds: Seconds  # of the epochs after it
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.short_examples", description=__doc__.split(":")[0]
    )
    parser.add_argument("--case", default="small", choices=[n for n, c in CASES.items() if c.model])
    parser.add_argument("--epochs", type=int, default=6, help="timed epochs of each; default: 6")
    args = parser.parse_args()
    sides = sides_of(named_case(args.case))
    epochs = dict(zip(sides, call(epochs_of, [case for _, case in sides.values()]), strict=True))
    measured = measure(sides, epochs, args.epochs)
    print(markdown(HEADINGS, [line(name, epochs[name], measured) for name in sides]))


def sides_of(base: Case) -> dict[str, tuple[str, Case]]:
    """What is compared: a contestant and its case."""
    case = replace(base, lengths=LENGTHS, batch_size=A_BATCH, tokens=A_ROW, target_share=0.5)
    grouped, packed = replace(case, batching="grouped"), replace(case, batching="packed", batch_size=1)
    sides = {"plain": ("ours", case), "grouped": ("ours", grouped), "packed": ("ours", packed)}
    return sides | ({"mlx-lm, grouped": ("mlx-lm", grouped)} if named_entry("mlx-lm").is_installed else {})


def epochs_of(cases: list[Case]) -> list[Epoch]:
    return [epoch_of(case) for case in cases]


def epoch_of(case: Case) -> Epoch:
    from mlx_impl.fast.forward import FAST

    from .inputs import random_windows

    assert case.model
    batches = [batch for (batch,) in random_windows(case, case.model)]
    shapes = {
        (*(array.shape for array in (*arrays, *kept)), *sub_batches)
        for *arrays, sub_batches, kept in map(FAST.to_arrays, batches)
    }
    sums = sum(b.num_tokens for b in batches), sum(b.inputs_BT.size for b in batches)
    return Epoch(len(batches), len(shapes), *sums)


def measure(
    sides: dict[str, tuple[str, Case]], epochs: dict[str, Epoch], num_epochs: int
) -> dict[str, Measured]:
    with ExitStack() as stack:
        kernels = Path(stack.enter_context(TemporaryDirectory()))
        running = {name: stack.enter_context(started(*side, kernels / name)) for name, side in sides.items()}
        first_steps = {name: side.hello.first_step_seconds for name, side in running.items()}
        firsts = {
            name: first_steps[name] + side.seconds_of(epochs[name].updates - 1)
            for name, side in running.items()
        }
        turns = {
            name: partial(side.seconds_of, epochs[name].updates, warm=True) for name, side in running.items()
        }
        seconds = interleave(turns, num_epochs)
        peaks = {name: side.peak(epochs[name].updates).peak_bytes for name, side in running.items()}
    return {name: Measured(firsts[name], seconds[name], peaks[name]) for name in sides}


def started(trainer: str, case: Case, kernels: Path) -> Side:
    """On a GPU the next one is not held up until this one has done its first step."""
    if case.needs_gpu:
        return Side(trainer, case, own_kernels(kernels), waits=False)
    return Side(trainer, case)


def own_kernels(folder: Path) -> dict[str, str]:
    """The environment in which MLX keeps compiled kernels here, beginning with those that it already has.

    It writes them in place, so a process that starts beside another could read half of one.
    """
    default = Path(gettempdir(), "mlx", version("mlx"), "ptx")
    compiled = Path(os.environ.get("MLX_PTX_CACHE_DIR", default))
    if compiled.is_dir():
        copytree(compiled, folder)
    return {"MLX_PTX_CACHE_DIR": str(folder)}


def line(name: str, epoch: Epoch, measured: dict[str, Measured]) -> tuple[str, ...]:
    """One of the table. The ratio is that of the seconds of an epoch."""
    own = measured[name]
    return (
        name,
        f"{epoch.tokens / statistics.median(own.seconds):.0f}",
        "" if name == "plain" else str(ratio_of(measured["plain"].seconds, own.seconds)),
        shown_seconds(own.first),
        f"{epoch.updates}",
        f"{epoch.shapes}",
        f"{1 - epoch.tokens / epoch.positions:.0%}",
        shown_bytes(own.peak_bytes),
    )


if __name__ == "__main__":
    main()
