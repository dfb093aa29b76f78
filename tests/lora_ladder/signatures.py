"""A signature: a known bug as a wrong reference, whose answers are compared with those of a trainer.

A signature is a test by computation. Its hypothesis builds the reference with the bug, does the same act with
it, and the trainer's answers must be equal to those within the derived tolerance (tests/derived.py), in every
observation of a family (observations.py). So it speaks only where it explains all values that it is compared
with; culprit.py decides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.cases import Case
from tests.lora_ladder.judge import Act, arrays
from tests.lora_ladder.protocol import Arrays
from tests.trainers.reference import Run, oracle

# (class of the reference in the trainer's dialect, case, act) -> the results that the bug would give
Hypothesis = Callable[[Any, Case, Act], Arrays]


@dataclass(frozen=True)
class Signature:
    """A bug by name, the rung where it shows first, what the report says, and how it is computed."""

    name: str
    rung: int
    sentence: str
    hypothesis: Hypothesis | None  # None: signatures_dropout.py compares the law of random masks
    link: str = ""  # a trap of tests/traps, a public bug or a paper
    dialect: str = ""  # the declaration with which the ladder would accept this, if there is one


def sound(trainer: Any, case: Case, act: Act) -> Arrays:
    """The act's results, of any form: a wrong trainer may give a loss too few."""
    return arrays(act(case.build(trainer)._trainer))


def patched(*places: tuple[Any, dict[str, Any]]) -> Hypothesis:
    """The reference while members of modules or classes are replaced."""

    def hypothesis(right: Any, case: Case, act: Act) -> Arrays:
        with ExitStack() as stack:
            for place, members in places:
                stack.enter_context(patch.multiple(place, **members))
            return sound(right, case, act)

    return hypothesis


def of_dialect(**fields: Any) -> Hypothesis:
    """The reference in a dialect that the trainer does not declare."""

    def hypothesis(right: Any, case: Case, act: Act) -> Arrays:
        return sound(oracle(replace(right.dialect, **fields), right.dtype), case, act)

    return hypothesis


def of_case(change: Callable[[Case], Case]) -> Hypothesis:
    """The reference with other settings, weights or factors than it should have."""
    return lambda right, case, act: sound(right, change(case), act)


def of_members(**members: Callable[..., Any]) -> Hypothesis:
    """The reference with other methods; each is given the trainer, the right method and its arguments."""

    def hypothesis(right: Any, case: Case, act: Act) -> Arrays:
        def wrong(name: str, member: Callable[..., Any]) -> Callable[..., Any]:
            return lambda self, *given: member(self, getattr(right, name).__get__(self), *given)

        return sound(type("Wrong", (right,), {n: wrong(n, m) for n, m in members.items()}), case, act)

    return hypothesis


def of_batches(change: Callable[[Batch], Batch]) -> Hypothesis:
    """The reference that reads other targets, or another mask, out of each batch."""
    return of_members(tensors=lambda _self, tensors, batch: tensors(change(batch)))


def of_runs(change: Callable[[Any, Run, TrainConfig], object]) -> Hypothesis:
    """The reference whose optimizer, schedule or update is changed when a run begins."""

    def begin(trainer: Any, begin: Callable[[TrainConfig], Run], training: TrainConfig) -> Run:
        run = begin(training)
        change(trainer, run, training)
        return run

    return of_members(begin=begin)
