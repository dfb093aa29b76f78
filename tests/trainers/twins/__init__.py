"""Red twins: `mlx_impl` with one bug each, and the rung of the ladder that must notice it first.

A test that never failed has proven little. Each twin is a small patch with its story and, where there is one,
the public bug that it stands for; `tests/trainers/test_red_twins.py` plants them one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from tests.trainers.twins import equivalences, forward, generation, gradient, layer, loss, ops, state, step
from tests.trainers.twins.twin import Twin as Twin

GROUPS = (ops, layer, forward, loss, gradient, step, equivalences, state, generation)
ALL: list[Twin] = [twin for group in GROUPS for twin in group.TWINS]
TWINS = {twin.name: twin for twin in ALL}
RUNGS = range(1, 15)  # rung 0 judges the platform


def quick() -> dict[str, Twin]:
    """Those that stand for a public bug, and of each rung without one the first two."""
    named = {name: twin for name, twin in TWINS.items() if twin.source}
    for rung in set(RUNGS) - {twin.rung for twin in named.values()}:
        of_rung = [twin for twin in TWINS.values() if twin.rung == rung]
        named |= {twin.name: twin for twin in of_rung[:2]}
    return {name: twin for name, twin in TWINS.items() if name in named}


def planted() -> dict[str, Twin]:
    """All of them by night, that is with HYPOTHESIS_PROFILE=nightly."""
    return TWINS if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else quick()


def table(measured: Mapping[str, str] | None = None) -> Iterator[str]:
    """The lines of the README's table; with a column more, of those twins that were measured."""
    yield "| Twin | Rung | What is broken | Stands for |" + " Times its tolerance |" * bool(measured)
    yield "|---|---|---|---|" + "---|" * bool(measured)
    for twin in TWINS.values() if measured is None else map(TWINS.__getitem__, measured):
        times = f" {measured[twin.name]} |" if measured else ""
        yield f"| `{twin.name}` | {twin.rung} | {twin.story} | {twin.source} |{times}"
