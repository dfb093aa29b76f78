"""The ladder examined: every red twin fails it, at the right rung, and the sound trainer does not.

The twins that stand for a public bug are planted each time, all of them with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.trainers.conftest import Tally
from tests.trainers.twins import ALL, RUNGS, TWINS, planted, quick, table
from tests.trainers.twins.climb import first_failure, sound
from tests.trainers.twins.twin import Twin

PLANTED = planted()


def test_the_sound_trainer_passes_the_same_climb() -> None:
    """The control: without a patch nothing fails, and no rung is empty."""
    result, _ = sound()
    assert not result.failed, result.failed[0]
    assert set(result.passed) == set(RUNGS)


@pytest.mark.parametrize("twin", PLANTED.values(), ids=PLANTED)
def test_every_red_twin_is_caught_at_the_right_rung(twin: Twin, tally: Tally) -> None:
    """The first claim that fails is of its rung, so all of the lower rungs have passed; by its figures, not
    because what was planted has another signature than what it stands for."""
    caught = first_failure(twin)
    tally.count(None if caught is None else caught.rung == twin.rung)
    assert caught is not None, f"{twin.name} is not caught"
    report = caught.report
    assert caught.rung == twin.rung, (
        f"{twin.name} belongs to rung {twin.rung}, and fails {caught.claim}:\n{report}"
    )
    assert not re.search(r"^E +(Type|Attribute|Name)Error", report, re.MULTILINE), report
    times = caught.times_tolerance
    assert times is None or times >= twin.least, f"{times:.3g} tolerances, at least {twin.least:g} were said"


def test_every_rung_has_its_twins() -> None:
    """From the operations to generation, each time; rung 0 judges the platform and not the trainer."""
    assert {twin.rung for twin in TWINS.values()} == {twin.rung for twin in quick().values()} == set(RUNGS)


def test_no_two_twins_have_one_name_and_forty_are_the_least() -> None:
    """A name in the table is one bug."""
    assert len(ALL) == len(TWINS) >= 40


def test_the_table_in_the_readme_is_that_of_the_twins() -> None:
    """Line by line, but for the last column, which is measured. So are the figures above it."""
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    assert f"`red twins: {len(quick())} of {len(TWINS)} planted" in readme
    shown = [line for line in readme.splitlines() if line.startswith("|")]
    assert [re.sub(r"[^|]+\|$", "", line) for line in shown] == list(table())
