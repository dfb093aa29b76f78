"""The ladder examined: every mutant fails it, at the right rung, and the sound trainer does not.

Each time one mutant of each rung is planted, and tried on the claims of that rung. With
HYPOTHESIS_PROFILE=nightly all are planted, and tried on every rung from the lowest.
"""

from __future__ import annotations

import re
import subprocess
import sys
from inspect import isfunction, signature
from pathlib import Path
from types import FunctionType
from unittest.mock import patch

import pytest

from tests.nightly import IS_NIGHTLY
from tests.trainers.conftest import Tally
from tests.trainers.mutants import ALL, MUTANTS, RUNGS, planted, quick, table
from tests.trainers.mutants.climb import first_failure, first_failure_at_its_rung, sound
from tests.trainers.mutants.mutant import PLAIN, SHIPPED, Mutant

PLANTED = planted()


@pytest.mark.nightly
@pytest.mark.parametrize("trainer", [SHIPPED, PLAIN])
def test_the_sound_trainer_passes_the_same_climb(trainer: str) -> None:
    """The control: without a patch no claim fails, and every rung has claims."""
    result, _ = sound(trainer)
    assert not result.failed, result.failed[0]
    assert set(result.passed) == set(RUNGS)


@pytest.mark.parametrize("mutant", PLANTED.values(), ids=PLANTED)
def test_every_mutant_is_caught_at_the_right_rung(mutant: Mutant, tally: Tally) -> None:
    """A claim of the mutant's rung fails. At night the lower rungs are tried too, and must pass.

    It must fail because numbers differ, not because the patch has the wrong signature (a TypeError, say).
    """
    caught = first_failure(mutant) if IS_NIGHTLY else first_failure_at_its_rung(mutant)
    tally.count(None if caught is None else caught.rung == mutant.rung)
    assert caught is not None, f"{mutant.name} is not caught"
    report = caught.report
    assert caught.rung == mutant.rung, (
        f"{mutant.name} belongs to rung {mutant.rung}, and fails {caught.claim}:\n{report}"
    )
    assert not re.search(r"^E +(Type|Attribute|Name)Error", report, re.MULTILINE), report
    times = caught.times_tolerance
    assert times is None or times >= mutant.least, (
        f"{times:.3g} tolerances, expected at least {mutant.least:g}"
    )


def test_every_rung_has_its_mutants() -> None:
    """Also with the quick selection. Rung 0 has none, because it judges the platform and not the trainer."""
    assert (
        {mutant.rung for mutant in MUTANTS.values()}
        == {mutant.rung for mutant in quick().values()}
        == set(RUNGS)
    )


def test_no_two_mutants_share_a_name_and_there_are_at_least_forty() -> None:
    """A name in the table means one bug."""
    assert len(ALL) == len(MUTANTS) >= 40


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_takes_what_the_function_that_it_replaces_takes(name: str) -> None:
    """Else it would end in a TypeError. `real` is the sound function, bound as a default."""
    for target, broken in MUTANTS[name].patches.items():
        found = patch(target, broken)
        sound = getattr(found.getter(), found.attribute)
        if isfunction(sound) and isfunction(broken):
            assert taken_by(broken) >= taken_by(sound), target


def taken_by(function: FunctionType) -> float:
    """How many arguments; infinity where it takes any more."""
    parameters = signature(function).parameters.values()
    takes_any = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return float("inf") if takes_any else sum(p.name != "real" for p in parameters)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "bugs", ["held_out", *(f"held_out_{n}" for n in ("again", "third", "fourth", "fifth"))]
)
def test_a_user_sees_every_bug_by_others(bugs: str) -> None:
    program = [sys.executable, "-m", f"tests.trainers.{bugs}_effects"]
    found = subprocess.run(program, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_table_in_the_readme_is_that_of_the_mutants() -> None:
    """Line by line, except for the last column, which is measured. The counts above it are checked too."""
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    assert f"`mutants: {len(quick())} of {len(MUTANTS)} planted" in readme
    shown = [line for line in readme.splitlines() if line.startswith("|")]
    assert [re.sub(r"[^|]+\|$", "", line) for line in shown] == list(table())
