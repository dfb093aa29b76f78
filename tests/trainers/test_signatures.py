"""The ladder names the culprit: each signature its bug, none another's, and a sound trainer none at all.

How often the right kind is named is measured on mutants that were set aside. FIRST was drawn from all mutants
before a signature was written, SECOND from those of the rungs 1 to 11 before one was run.
This is no blind test: the mutants' stories were known when the signatures were written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lora_ladder.culprit import RUNGS, WIDTH, Culprit, culprit_lines, find, sentences
from tests.lora_ladder.known_bugs import SIGNATURES
from tests.lora_ladder.outcome import Failure
from tests.lora_ladder.plugin import Ladder
from tests.nightly import IS_NIGHTLY, mostly_at_night
from tests.trainers.minimal import MinimalTrainer
from tests.trainers.mlx_impl import MlxTrainer, PlainTrainer
from tests.trainers.mutants import MUTANTS
from tests.trainers.mutants.mutant import PLAIN, Mutant
from tests.trainers.reference import Float32Reference
from tests.trainers.set_aside import FIRST, SECOND, SET_ASIDE
from tests.trainers.signature_bugs import OF_MUTANTS, OF_OTHERS
from tests.trainers.signature_bugs_of_gradients import OF_GRADIENTS
from tests.trainers.signature_bugs_of_updates import OF_UPDATES

ROOT = Path(__file__).parents[2]
BY_NAME = {signature.name: signature for signature in SIGNATURES}


def culprit_of(bug: Mutant, rung: int) -> Culprit:
    if rung not in RUNGS:
        return Culprit()  # as the report has none
    with bug.planted():
        return find(PlainTrainer if bug.trainer == PLAIN else MlxTrainer, rung)


def names(culprit: Culprit) -> list[str]:
    return [signature.name for signature in culprit.named]


@pytest.mark.parametrize(
    "trainer", mostly_at_night([MinimalTrainer, MlxTrainer, PlainTrainer, Float32Reference], 1)
)
def test_a_sound_trainer_has_no_culprit(trainer: Any) -> None:
    """It departs in no family, so no signature is tried."""
    assert find(trainer, rung=14 if IS_NIGHTLY else 6) == Culprit()


EACH_TIME = ("scale is 20", "rope interleaved", "pad targets 1", "A cut from B")
BUGS = [(MUTANTS[mutant], name) for mutant, name in OF_MUTANTS.items()]
BUGS += [(bug, name) for name, bug in (OF_OTHERS | OF_GRADIENTS | OF_UPDATES).items()]


@pytest.mark.parametrize(
    ("bug", "name"),
    [
        pytest.param(bug, name, id=name, marks=() if name in EACH_TIME else pytest.mark.nightly)
        for bug, name in BUGS
    ],
)
def test_a_planted_bug_is_named_and_no_other(bug: Mutant, name: str) -> None:
    culprit = culprit_of(bug, BY_NAME[name].rung)
    assert names(culprit) == [name], (culprit.family, culprit.fails)


def test_there_are_at_least_twenty_five_signatures_and_no_two_share_a_name() -> None:
    assert len(BY_NAME) == len(SIGNATURES) >= 25
    assert {name for _, name in BUGS} <= set(BY_NAME)


class Unheard(MinimalTrainer):
    """A bug that no signature has: the third token's logit is always a bit larger."""

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        logits_BTV: np.ndarray = super().logits(tokens_BT)  # type: ignore[no-untyped-call]
        logits_BTV[..., 2] += 0.5
        return logits_BTV


def test_a_bug_that_no_signature_has_is_not_known() -> None:
    culprit = find(Unheard)
    assert culprit.family == "logits" and culprit.named == []
    assert list(sentences(culprit))[-1].startswith("culprit: not known; none of")


def test_of_two_bugs_at_once_none_is_named() -> None:
    """Neither explains the values that the other one changes too."""
    with OF_OTHERS["rope base 500000"].planted(), MUTANTS["norm-eps-outside-the-root"].planted():
        assert names(find(PlainTrainer)) == []


class WithoutCorrection(MinimalTrainer):
    """AdamW as MLX has it."""

    def train(self, windows: Any, training: Any) -> Any:
        with MUTANTS["no-bias-correction"].planted():
            return super().train(windows, training)  # type: ignore[no-untyped-call]


def test_the_report_says_what_fails_what_passes_and_the_declaration_that_would_pass() -> None:
    """In lines of at most 80 columns; a trap is linked by its path."""
    ladder = Ladder("", WithoutCorrection, failures=[Failure(8, "test_08_step.py::test", "")])
    lines = list(culprit_lines(ladder))
    text = re.sub(r"\s+", " ", " ".join(lines))
    assert all(len(line) <= WIDTH for line in lines)
    assert "fails (updates): adamw, first update; adamw, three updates" in text
    assert "passes: sgd, first update; sgd, three updates" in text
    assert "culprit: Adam without bias correction" in text
    assert "with bias_correction = False this passes" in text
    assert "see tests/traps/test_trap_adam_bias.py" in text


def test_every_trap_that_is_linked_exists() -> None:
    links = {signature.link for signature in SIGNATURES if signature.link.startswith("tests/")}
    assert links and all((ROOT / link).is_file() for link in links)


@pytest.mark.nightly
def test_of_bugs_set_aside_the_right_one_is_named_mostly_and_a_wrong_one_hardly_ever() -> None:
    """70% of those whose kind has a signature; less than 5% of all of them."""
    nameable: Mapping[str, str] = FIRST | SECOND
    found = {name: names(culprit_of(MUTANTS[name], MUTANTS[name].rung)) for name in SET_ASIDE}
    right = [name for name, kind in nameable.items() if found[name] == [kind]]
    wrong = {name: kinds for name, kinds in found.items() if set(kinds) - {nameable.get(name)}}
    print(f"named right {len(right)} of {len(nameable)}, wrong {len(wrong)} of {len(found)}: {wrong}")
    assert len(right) >= 0.7 * len(nameable)
    assert len(wrong) < 0.05 * len(found)


def test_the_bugs_set_aside_are_mutants_and_no_signature_was_written_for_them() -> None:
    assert set(SET_ASIDE) <= set(MUTANTS) and len(SET_ASIDE) == len(set(SET_ASIDE))
    assert not set(SET_ASIDE) & set(OF_MUTANTS)
