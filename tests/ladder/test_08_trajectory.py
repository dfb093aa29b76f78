"""Rung 8, trajectory: ten optimizer steps, and after them every factor equals PyTorch's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mlx_impl.config import TrainConfig
from tests.derived import assert_within_rounding
from tests.ladder.conftest import LORA, Case
from tests.trainers.mlx_impl import MlxTrainer

NUM_STEPS = 10


@pytest.mark.parametrize(
    "training",
    [
        TrainConfig(iters=NUM_STEPS, learning_rate=0.01, weight_decay=0.1),
        TrainConfig(iters=NUM_STEPS, learning_rate=0.05, weight_decay=0.1, optimizer="sgd"),
    ],
    ids=["adamw", "sgd"],
)
def test_ten_steps_equal_the_reference(case: Case, training: TrainConfig) -> None:
    """Losses and factors, against torch.optim with its defaults."""
    runs = []
    for trainer in (case.ours(), case.reference(torch.float32), case.reference()):
        losses = trainer.train([case.batch] * NUM_STEPS, training)
        runs.append({"losses": np.array(losses), **trainer.factors()})
    ours, ref32, ref64 = runs
    assert_within_rounding("rung 8, trajectory", ours, ref32, ref64, case.longest_sum)
    assert ours["losses"][-1] < ours["losses"][0]


@pytest.mark.parametrize("compiled", [False, True])
def test_every_step_draws_a_new_dropout_mask(case: Case, compiled: bool) -> None:
    """At learning rate 0 only it differs; a compiler not told of the random state would repeat it."""
    trainer = MlxTrainer(case.spec, case.weights, replace(LORA, dropout=0.5), case.factors)
    losses = trainer.train([case.batch] * 3, TrainConfig(iters=3, learning_rate=0.0), compiled)
    assert len(set(losses)) == 3


def test_a_compiled_step_equals_an_eager_one(case: Case) -> None:
    """Every state that a step changes is captured: ten compiled steps move as ten eager ones do."""
    training = TrainConfig(iters=NUM_STEPS, learning_rate=0.01)
    runs = []
    for compiled in (True, False):
        trainer = case.ours()
        losses = trainer.train([case.batch] * NUM_STEPS, training, compiled=compiled)
        runs.append({"losses": np.array(losses), **trainer.factors()})
    reference = case.reference()
    losses64 = reference.train([case.batch] * NUM_STEPS, training)
    ref64 = {"losses": np.array(losses64), **reference.factors()}
    compiled_run, eager_run = runs
    assert_within_rounding("rung 8, compiled", compiled_run, eager_run, ref64, case.longest_sum)
