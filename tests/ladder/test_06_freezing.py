"""Rung 6, freezing: the base does not move by a bit, every factor does, and nothing else is trained.

Weight decay is on, because decay moves a parameter that has no gradient. MLX: `freeze()` first, then add the
adapter; frozen after it, the factors train no more than the base, and unfrozen by a careless `unfreeze()` the
base trains with them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.derived import some_of
from tests.ladder.cases import Case
from tests.ladder.protocol import Arrays

TRAINING = TrainConfig(iters=3, learning_rate=0.01, weight_decay=0.1)
each_kind = pytest.mark.parametrize(
    "case", ["untied", "tied", "qkv bias", "dora", "last layer"], indirect=True
)


def digests(arrays: Arrays) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


@each_kind
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_frozen_byte_is_identical_after_training(case: Case, candidate: Any, optimizer: str) -> None:
    """Three updates with weight decay; sha256 of every base tensor."""
    trainer = case.build(candidate)
    before = digests(trainer.base())
    trainer.train([[case.batch]] * 3, replace(TRAINING, optimizer=optimizer))
    moved = [name for name, digest in digests(trainer.base()).items() if digest != before[name]]
    assert not moved, f"frozen, and moved: {some_of(moved)}"


@each_kind
def test_every_factor_changes(case: Case, candidate: Any) -> None:
    """Also A, whose gradient is zero in the first update when B starts at zero."""
    trainer = case.with_zero_b().build(candidate)
    before = trainer.factors()
    trainer.train([[case.batch]] * 3, TRAINING)
    unchanged = [n for n, value in trainer.factors().items() if np.array_equal(value, before[n])]
    assert not unchanged, f"trained, and unchanged: {some_of(unchanged)}"


@each_kind
def test_only_the_factors_have_gradients(case: Case, candidate: Any) -> None:
    """The gradients' names are exactly the factors'."""
    trainer = case.build(candidate)
    assert set(trainer.gradients(case.batch)) == set(trainer.factors()) == set(case.factors)


@pytest.mark.needs("optimizer_names")
@each_kind
def test_only_the_factors_have_optimizer_state(case: Case, candidate: Any) -> None:
    """Moments of frozen weights would cost twice the model's memory, and move it by decay."""
    assert set(case.build(candidate).optimizer_names(TRAINING)) == set(case.factors)
