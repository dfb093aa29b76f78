"""What several ranks gain: `mlx.launch -n 2 --backend nccl -- python -m benchmarks.ranks`, on one GPU each.

An update has one micro-batch for each rank. Ours, in order and in any order, is timed in turn with one rank
that computes the whole update while the others wait, with ranks that send nothing (what the host costs that
they share), and with mlx-lm where it is installed.

    efficiency = t(one rank) / (ranks * t(all ranks)), of the same update
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_impl.run.ranks import Ranks, join_ranks
from mlx_impl.train import Sums

from .cases import CASES, Case, named_case
from .contestants.ours import Ours
from .inputs import Inputs, random_weights, random_windows

UNTIMED = 2  # steps before each timed one: the other contestants have left the GPU's clocks and caches cold
MIB = 2**20
TRAINERS = {"in order", "in any order", "mlx-lm"}
Steps = dict[str, Callable[[], Any]]  # what takes one step of each contestant


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.split(":")[0])
    parser.add_argument("--case", default="tinyllama", choices=[n for n, c in CASES.items() if c.model])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each; default: 10")
    args = parser.parse_args()
    ranks = join_ranks()
    steps = contestants(ranks, named_case(args.case))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.steps):
        for name, step in steps.items():
            seconds[name].append(step_seconds(ranks, step))
    if ranks.rank == 0:
        print(f"{args.case}, {ranks.size} ranks, medians of {args.steps} steps taken in turn")
        report(ranks.size, {name: statistics.median(times) for name, times in seconds.items()})
    for name in sorted(TRAINERS & steps.keys()):
        mx.reset_peak_memory()
        steps[name]()
        if ranks.rank == 0:
            print(f"peak of {name}, beside the weights of all: {mx.get_peak_memory() / MIB:.0f} MiB")


def contestants(ranks: Ranks, case: Case) -> Steps:
    """One rank leaves the others nothing to do but to wait."""
    assert case.model is not None
    whole = replace(case, micro_batches=ranks.size)
    inputs = Inputs(case.model, random_windows(whole, case.model), random_weights(case.model))
    own = replace(inputs, windows=[[window[ranks.rank]] for window in inputs.windows])
    any_order = Ranks(ranks.group, in_order=False)
    steps: Steps = {
        "one rank": Ours(inputs, whole).step if ranks.rank == 0 else lambda: None,
        "each rank for itself": Ours(own, case).step,
        "in order": Ours(inputs, whole, ranks=ranks).step,
        "in any order": Ours(inputs, whole, ranks=any_order).step,
    }
    if importlib.util.find_spec("mlx_lm"):
        from .contestants.mlx_lm import MlxLm

        steps["mlx-lm"] = MlxLm(own, case).step
    for megabytes in (10, 100):
        for order, group in (("order", ranks), ("any order", any_order)):
            steps[f"sums of {megabytes} MiB in {order}"] = sums_alone(group, megabytes * MIB)
    return steps


def sums_alone(ranks: Ranks, num_bytes: int) -> Callable[[], Any]:
    """Add up float32 gradients that are there already."""
    ready: Sums = (mx.array(0.0), mx.array(1)), mx.zeros(num_bytes // 4)
    return lambda: mx.eval(ranks.reduce([lambda: ready] * ranks.size))


def step_seconds(ranks: Ranks, step: Callable[[], Any]) -> float:
    """Of one step that all ranks begin together, until the last has ended it."""
    for _ in range(UNTIMED):
        step()
    ranks.largest(0)
    start = time.perf_counter()
    step()
    ranks.largest(0)
    return time.perf_counter() - start


def report(num_ranks: int, median_seconds: dict[str, float]) -> None:
    for name, seconds in median_seconds.items():
        efficiency = median_seconds["one rank"] / (num_ranks * seconds)
        print(f"{name:<28}{1e3 * seconds:9.2f} ms" + f"  efficiency {efficiency:.3f}" * (name in TRAINERS))


if __name__ == "__main__":
    main()
