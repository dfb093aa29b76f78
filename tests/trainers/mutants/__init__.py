"""Mutants: `mlx_impl` with one planted bug each, and the rung of the ladder that must catch it first.

A test that never failed has proven little. Each mutant is a small patch with a story and, where there is one,
the public bug that it stands for. `tests/trainers/test_mutants.py` plants them one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.lora_ladder.climb import RUNGS as RUNGS
from tests.nightly import is_nightly
from tests.trainers.mutants import (
    between,
    combinations,
    data,
    equivalences,
    extremes,
    files,
    fit,
    forward,
    generation,
    gradient,
    held_out,
    held_out_again,
    held_out_fifth,
    held_out_fourth,
    held_out_third,
    layer,
    loss,
    metamorphic,
    ops,
    options,
    randomness,
    ranks,
    sizes,
    state,
    step,
)
from tests.trainers.mutants.mutant import Mutant as Mutant

GROUPS = (
    ops,
    layer,
    forward,
    loss,
    gradient,
    step,
    equivalences,
    metamorphic,
    state,
    combinations,
    randomness,
    options,
    files,
    generation,
    sizes,
    extremes,
    data,
    fit,
    ranks,
    held_out,
    held_out_again,
    held_out_third,
    between,
    held_out_fourth,
    held_out_fifth,
)
QUICK = 1  # mutants of each rung that are planted each time
ALL: list[Mutant] = [mutant for group in GROUPS for mutant in group.MUTANTS]
MUTANTS = {mutant.name: mutant for mutant in ALL}


def quick() -> dict[str, Mutant]:
    """One mutant of each rung; one that stands for a public bug if there is one."""
    chosen = set()
    for rung in RUNGS:
        of_rung = [mutant for mutant in MUTANTS.values() if mutant.rung == rung]
        chosen |= {mutant.name for mutant in sorted(of_rung, key=lambda mutant: not mutant.source)[:QUICK]}
    return {name: mutant for name, mutant in MUTANTS.items() if name in chosen}


def planted() -> dict[str, Mutant]:
    """All mutants with HYPOTHESIS_PROFILE=nightly, otherwise the quick selection."""
    return MUTANTS if is_nightly() else quick()


def table(measured: Mapping[str, str] | None = None) -> Iterator[str]:
    """The lines of the README's table. With `measured`, only those mutants, and the measured column."""
    yield "| Mutant | Rung | What is broken | Stands for |" + " Times its tolerance |" * bool(measured)
    yield "|---|---|---|---|" + "---|" * bool(measured)
    for mutant in MUTANTS.values() if measured is None else map(MUTANTS.__getitem__, measured):
        times = f" {measured[mutant.name]} |" if measured else ""
        yield f"| `{mutant.name}` | {mutant.rung} | {mutant.story} | {mutant.source} |{times}"
