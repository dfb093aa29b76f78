"""Rung 7, freezing: training changes no bit of the base and changes every factor.

Weight decay is on, because it moves a parameter even without a gradient. MLX: call `freeze()` first, then add
the adapter. If `freeze()` comes after, the factors are frozen too; after a careless `unfreeze()` the base
trains as well.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.derived import some_of
from tests.lora_ladder.cases import Case
from tests.lora_ladder.protocol import Arrays

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
    """A as well, although its gradient is zero in the first update, where B is zero."""
    trainer = case.with_zero_b().build(candidate)
    before = trainer.factors()
    trainer.train([[case.batch]] * 3, TRAINING)
    unchanged = [n for n, value in trainer.factors().items() if np.array_equal(value, before[n])]
    assert not unchanged, f"trained, and unchanged: {some_of(unchanged)}"


@each_kind
def test_only_the_factors_have_gradients(case: Case, candidate: Any) -> None:
    """The gradients have exactly the names of the factors."""
    trainer = case.build(candidate)
    assert set(trainer.gradients(case.batch)) == set(trainer.factors()) == set(case.factors)


@pytest.mark.needs("optimizer_names")
@each_kind
def test_only_the_factors_have_optimizer_state(case: Case, candidate: Any) -> None:
    """Moments of frozen weights would cost twice the model's memory, and weight decay would move them."""
    assert set(case.build(candidate).optimizer_names(TRAINING)) == set(case.factors)
