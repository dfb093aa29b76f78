"""Trainers that must pass the ladder: the reference, the plain pattern, and the smallest adapter."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from tests.lora_ladder.climb import RUNGS, climb
from tests.nightly import IS_NIGHTLY
from tests.trainers.minimal import MinimalTrainer

README = (Path(__file__).parents[1] / "lora_ladder" / "README.md").read_text(encoding="utf-8")
LINES = 30  # of code that the smallest adapter may have at most
STEP = (2, *range(4, 12))  # from a layer to the equivalences of whole updates


@pytest.mark.parametrize("name", ["Float32Reference", "ReferenceTrainer"][: 1 + IS_NIGHTLY])
def test_the_reference_climbs_its_own_ladder(name: str) -> None:
    """In float32 it is another right trainer.

    Rungs 4 to 8. With the nightly profile on every rung and case, and in float64, where it is the oracle
    compared with itself.
    """
    cases, rungs = (None, RUNGS) if IS_NIGHTLY else (["untied", "dora"], range(4, 9))
    ladder = climb(f"tests.trainers.reference:{name}", "-m", "not slow", rungs=rungs, cases=cases)
    assert ladder.first_divergence is None, ladder.first_divergence


def test_the_plain_pattern_climbs() -> None:
    """`--trainer plain`, on the rungs of a step's own code; a run of tests/lora_ladder judges what ships.

    With the nightly profile, on every rung and case, and on several ranks, whose sums are not the pattern's.
    """
    cases, rungs = (None, RUNGS) if IS_NIGHTLY else (["untied", "dora"], STEP)
    options = [] if IS_NIGHTLY else ["-m", "not slow", "-k", "not ranks"]
    ladder = climb("plain", *options, rungs=rungs, cases=cases)
    assert ladder.first_divergence is None, ladder.first_divergence
    assert all(ladder.outcomes[rung]["passed"] for rung in rungs)


def test_the_smallest_adapter_climbs() -> None:
    """Nothing that it claims fails, in the case "untied"; what it does not offer is not claimed."""
    rungs = RUNGS if IS_NIGHTLY else range(4, 9)
    ladder = climb("tests.trainers.minimal:MinimalTrainer", "-m", "not slow", rungs=rungs, cases=["untied"])
    assert ladder.first_divergence is None
    assert all(ladder.outcomes[rung]["passed"] for rung in range(4, 9))


def test_the_readme_shows_the_smallest_adapter() -> None:
    shown = re.findall(r"```python\n(class MinimalTrainer.*?)```", README, re.DOTALL)
    assert shown == [inspect.getsource(MinimalTrainer)]
    assert len([line for line in shown[0].splitlines() if line.strip()]) <= LINES
