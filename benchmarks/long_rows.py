"""Step time and peak memory of one long row against its tokens: `python -m benchmarks.long_rows`.

The row is one example (causal), eight packed examples, or one example in a window of an eighth of the row.
Every position is a target, and the weights are random. On a GPU: `--case tinyllama --tokens 4096,8192,16384`.
The three take turns (ABCCBA), with untimed steps before the timed ones of each turn. The peak is that of a
step with the weights, which are the same for all three.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import numpy as np

from mlx_impl.data import Batch, Example, make_batch, make_packed_batch

from .cases import CASES, Case, named_case
from .table import markdown, shown_bytes, shown_seconds
from .worker import prepare

PARTS = 8  # examples of a packed row; windows in a row
UNTIMED = 2  # steps at the beginning of each turn: the first one is compiled
ROUNDS = 2
KINDS = ("causal", "packed", "window")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_rows", description=__doc__.split(":")[0])
    parser.add_argument("--case", default="tiny", choices=[n for n, c in CASES.items() if c.model])
    parser.add_argument("--tokens", default="1024,2048,4096,8192", help="of the row, separated by commas")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each of two turns; default: 5")
    parser.add_argument("--grad-checkpoint", action="store_true")
    args = parser.parse_args()
    blas = prepare({})
    case = replace(named_case(args.case), batch_size=1, checkpointed=args.grad_checkpoint)
    print(f"{args.case}, one row, {2 * args.steps} timed steps of each; {blas}")
    rows = [measured(case, int(tokens), args.steps) for tokens in args.tokens.split(",")]
    print(markdown(("tokens", *(f"{kind}: step, peak" for kind in KINDS)), rows))


def measured(case: Case, tokens: int, num_steps: int) -> tuple[str, ...]:
    """One line of the table."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peaks: dict[str, int] = {}
    for round_ in range(ROUNDS):
        for kind in KINDS if round_ % 2 == 0 else KINDS[::-1]:
            timed, peaks[kind] = turn(case, kind, tokens, num_steps)
            seconds[kind] += timed
    shown = [f"{shown_seconds(statistics.median(seconds[k]))}, {shown_bytes(peaks[k])}" for k in KINDS]
    print(f"{tokens}: " + "; ".join(f"{k} {s}" for k, s in zip(KINDS, shown, strict=True)), flush=True)
    return str(tokens), *shown


def turn(case: Case, kind: str, tokens: int, num_steps: int) -> tuple[list[float], int]:
    """The seconds of each timed step, and the most memory that they held."""
    import mlx.core as mx

    records = updates(case, kind, tokens)
    for _ in range(UNTIMED):
        next(records)
    mx.synchronize()
    mx.reset_peak_memory()
    seconds = [step_seconds(records) for _ in range(num_steps)]
    peak = mx.get_peak_memory()
    records.close()
    del records
    mx.clear_cache()
    return seconds, peak


def updates(case: Case, kind: str, tokens: int) -> Generator[Any]:
    """As `LoRATrainer` does them, on one row again and again."""
    import mlx.core as mx

    from mlx_impl.model import CausalLM
    from mlx_impl.run.trainer import LoRATrainer

    assert case.model is not None
    mx.random.seed(0)
    model = CausalLM(replace(case.model, sliding_window=tokens // PARTS if kind == "window" else None))
    model.set_dtype(getattr(mx, case.dtype))
    mx.eval(model.parameters())
    batch = row_of([tokens // PARTS] * PARTS if kind == "packed" else [tokens], case.model.vocab_size)
    yield from LoRATrainer(model, case.lora, case.training).fit_windows(repeat([batch]))


def row_of(lengths: Sequence[int], vocab_size: int) -> Batch:
    """Examples of random tokens, so many inputs each."""
    random = np.random.default_rng(0)
    examples = [
        Example(tuple(random.integers(1, vocab_size, n + 1).tolist()), (False,) + (True,) * n)
        for n in lengths
    ]
    if len(examples) == 1:
        return make_batch(examples)
    return make_packed_batch(examples, [tuple(range(len(examples)))])


def step_seconds(records: Iterator[Any]) -> float:
    """`train` waits for the update at its end."""
    start = time.perf_counter()
    next(records)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
