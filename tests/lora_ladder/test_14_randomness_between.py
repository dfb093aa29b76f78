"""Rung 14, randomness: what a program does between two updates leaves dropout as it was.

Every evaluation and every answer turns dropout off, and must turn it on again for the next update: what drops
nothing trains well and overfits, and nothing else shows it. MLX: the mode is a flag of every module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.lora_ladder.cases import Case
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays

PROMPTS = [[5, 9, 2], [5, 9, 11, 3], [7]]
TRAINING = TrainConfig(iters=4, learning_rate=0.01)
ACTS: dict[str, Callable[[Any, Case], object]] = {
    "evaluate": lambda trainer, case: trainer.evaluate([case.batch]),
    "greedy": lambda trainer, case: trainer.greedy(PROMPTS[0], 3),
    "greedy_all": lambda trainer, case: trainer.greedy_all(PROMPTS, 3, 60),
}
each_act = pytest.mark.parametrize(
    "act", [pytest.param(act, marks=pytest.mark.needs(name), id=name) for name, act in ACTS.items()]
)


@pytest.mark.needs("dropout_is_on")
@each_act
def test_an_evaluation_or_an_answer_leaves_dropout_as_it_was(
    case: Case, candidate: Any, judge: Judge, act: Callable[[Any, Case], object]
) -> None:
    """On in the middle of training, off in a model that was put into evaluation."""
    trainer = case.with_dropout(0.5).build(candidate)
    modes: dict[str, Callable[[], object]] = {
        "training": lambda: trainer.train([[case.batch]], TrainConfig(iters=1)),
        "evaluation": lambda: trainer.loss(case.batch),
    }
    for mode, put_into in modes.items():
        put_into()
        before = trainer.dropout_is_on()
        act(trainer, case)
        after = trainer.dropout_is_on()
        judge.claim(before == after, f"in {mode} dropout must stay {before}, got {after}")


@pytest.mark.needs("each_update")
@each_act
def test_the_updates_after_an_evaluation_or_an_answer_drop_the_same(
    case: Case, candidate: Any, judge: Judge, act: Callable[[Any, Case], object]
) -> None:
    """Between all updates: the losses and factors of a run without it, to the bit, at dropout 0.5."""
    dropping, windows = case.with_dropout(0.5), [[case.batch]] * TRAINING.iters

    def run(between: Callable[[Any], object]) -> Arrays:
        trainer, losses = dropping.build(candidate), []
        for loss in trainer.each_update(iter(windows), TRAINING):
            losses.append(loss)
            between(trainer)
        return {"losses": np.array(losses), **trainer.factors()}

    judge.same_bits(run(lambda trainer: act(trainer, case)), run(lambda trainer: None))
