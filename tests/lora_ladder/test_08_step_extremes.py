"""Rung 8, step: late updates, and NaN or infinity on the way into an update.

A run may have millions of updates. A counter in bfloat16 stops at 256, one in a byte starts again there, and
one in 16 bits at 65,536: Adam's bias correction shows the first ones, the schedule the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mlx_impl.config import TrainConfig
from tests.lora_ladder.cases import Case, copies
from tests.lora_ladder.extremes import (
    ENDS,
    require_lost,
    require_none_finite,
    unless_refused,
    with_number,
    with_ruined_token,
    without_targets,
)
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.test_08_step import SGD, TRAINING, by_either, given_gradients, moved

NUM_UPDATES = 4
STARTS = (254, 2046, 65_534, 1_000_000)
LATE = {
    "adamw, linear": replace(TRAINING, lr_schedule="linear"),
    "sgd, cosine": replace(SGD, weight_decay=0.0, lr_schedule="cosine"),
}
B = "model.layers.0.mlp.down_proj.lora_b"


@pytest.mark.needs("apply_gradients", "start_at")
@pytest.mark.alone
@pytest.mark.parametrize("training", LATE.values(), ids=LATE)
@pytest.mark.parametrize("done", STARTS)
def test_late_updates_move_a_factor_that_was_zero_as_in_the_reference(
    case: Case, judge: Judge, done: int, training: TrainConfig
) -> None:
    """Four updates, half-way through the run: bias correction and schedule count on."""
    zero, gradients = case.with_zero_b(), given_gradients(case, NUM_UPDATES)

    def act(trainer: Any) -> Arrays:
        trainer.start_at(done)
        factors = moved(trainer, gradients, replace(training, iters=2 * done))
        return {name: value for name, value in factors.items() if name.endswith("lora_b")}

    judge(zero, act, longest_sum=NUM_UPDATES)


@pytest.mark.needs("apply_gradients")
@pytest.mark.alone
@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("training", [SGD, TRAINING], ids=["sgd", "adamw"])
def test_a_given_gradient_that_ends_reaches_its_factor(
    case: Case, judge: Judge, training: TrainConfig, number: float
) -> None:
    """One element of one gradient: the same element of the factor is lost, or the update refused."""
    gradients = given_gradients(case, 2)
    gradients[0][B] = gradients[0][B].copy()
    gradients[0][B][1, 2] = number
    require_lost(judge, case, lambda t: moved(t, gradients, training), f"{number} in a gradient")


def with_infinite_loser(case: Case, judge: Judge) -> tuple[Case, Any]:
    """A finite loss with a gradient of NaN: one word's logit is -inf at the only target.

    The word's weight for one hidden feature is infinite, with the sign that this feature has not. The word
    then has no chance, so it costs nothing. But the gradient by the feature is 0 times infinity.
    """
    hidden_BTD = case.build(judge.oracle(torch.float64)).hidden_states(case.batch.inputs_BT)["model.norm"]
    mask_BT = np.zeros_like(case.batch.mask_BT)
    mask_BT[0, -1] = True
    word = (int(case.batch.targets_BT[0, -1]) + 1) % case.spec.vocab_size
    weights = copies(case.weights)
    weights["lm_head.weight"][word, 0] = -np.inf * np.sign(hidden_BTD[0, -1, 0])
    return replace(case, weights=weights), case.batch._replace(mask_BT=mask_BT)


@pytest.mark.needs("gradient_norms")
@pytest.mark.canonical("pad_targets")
@pytest.mark.parametrize("limit", [0.0, 2.0**-4], ids=["free", "clipped"])
def test_a_gradient_of_nan_under_a_finite_loss_has_no_norm(case: Case, judge: Judge, limit: float) -> None:
    """The update is refused, or the norm is NaN: not that of the other gradients."""
    ruined, batch = with_infinite_loser(case, judge)
    training = replace(SGD, iters=1, max_grad_norm=limit)

    def norms(trainer: Any) -> Arrays:
        return {"norms": np.array(by_either(lambda t: trainer.gradient_norms([[batch]], t), training))}

    require_lost(judge, ruined, norms, "a NaN gradient")


@pytest.mark.canonical("pad_targets")
@pytest.mark.parametrize("limit", [0.0, 2.0**-4], ids=["free", "clipped"])
@pytest.mark.parametrize("training", [SGD, TRAINING], ids=["sgd", "adamw"])
def test_a_gradient_of_nan_under_a_finite_loss_reaches_the_factors(
    case: Case, judge: Judge, training: TrainConfig, limit: float
) -> None:
    """The update is refused, or the factors are lost: it is neither skipped nor made of zeros."""
    ruined, batch = with_infinite_loser(case, judge)
    training = replace(training, iters=1, max_grad_norm=limit)

    def act(trainer: Any) -> Arrays:
        trainer.train([[batch]], training)
        return trainer.factors()

    require_lost(judge, ruined, act, "a NaN gradient")


@pytest.mark.parametrize("limit", [0.0, 2.0**-4], ids=["free", "clipped"])
@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
def test_a_loss_that_ends_is_reported_or_refused(
    case: Case, judge: Judge, number: float, limit: float
) -> None:
    """One row holds a token with NaN or infinity in its embedding; its update has no finite loss."""
    ruined, batch = with_ruined_token(case, number)
    training = replace(SGD, iters=1, max_grad_norm=limit)
    require_lost(
        judge, ruined, lambda t: {"losses": np.array(t.train([[batch]], training))}, f"{number} in a row"
    )


def test_the_second_update_after_a_ruined_one_is_no_number(case: Case, judge: Judge) -> None:
    """A run that goes on after NaN goes on with NaN, also over rows that hold none."""
    ruined, batch = with_ruined_token(case, np.nan)
    require_lost(
        judge,
        ruined,
        lambda t: {"losses": np.array(t.train([[batch], [case.batch]], replace(SGD, iters=2)))},
        "an update by NaN",
    )


@pytest.mark.canonical("pad_targets", "accumulation")
@pytest.mark.parametrize("training", [SGD, TRAINING], ids=["sgd", "adamw"])
def test_an_update_without_targets_is_refused_or_no_number(
    case: Case, candidate: Any, judge: Judge, training: TrainConfig
) -> None:
    """Its loss is 0 / 0, and not a perfect loss of 0."""
    trainer, windows = case.build(candidate), [[without_targets(case.batch)]]
    losses = unless_refused(lambda: trainer.train(windows, replace(training, iters=1)))
    if losses is not None:
        ours, lost = {"loss": np.array(losses[0])}, {"loss": np.array(True)}
        judge.report(lambda: require_none_finite("the loss over no target", ours, lost))


def test_a_factor_of_nan_is_not_trained_away(case: Case, judge: Judge) -> None:
    """Two updates later it is still NaN, or the first update was refused."""
    ruined = with_number(case, B, np.nan, (1, 2))

    def act(trainer: Any) -> Arrays:
        trainer.train([[case.batch]] * 2, replace(SGD, iters=2))
        return trainer.factors()

    require_lost(judge, ruined, act, "a NaN in a factor")
