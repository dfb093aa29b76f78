"""Rung 9, trajectory: over many updates, losses and factors stay those of PyTorch.

Errors too small to see in one update add up over many, and state that one update loses shows in the next. The
length of the longest sum is that of a gradient times the number of updates. MLX: nothing runs until
`mx.eval`. A loop that never evaluates its parameters builds an ever larger graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.cases import Case, one_prompt_batch
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays

RUNS = {
    "adamw": TrainConfig(iters=20, learning_rate=0.01, weight_decay=0.1),
    "sgd": TrainConfig(iters=10, learning_rate=0.05, weight_decay=0.1, optimizer="sgd"),
}
SCHEDULED = TrainConfig(iters=6, learning_rate=0.05, optimizer="sgd", lr_schedule="cosine", warmup_steps=2)
each_run = pytest.mark.parametrize("training", RUNS.values(), ids=RUNS)


def trained(trainer: Any, case: Case, training: TrainConfig, batch: Batch | None = None) -> Arrays:
    losses = trainer.train([[batch or case.batch]] * training.iters, training)
    return {"losses": np.array(losses), **trainer.factors()}


@each_run
def test_the_loss_falls(case: Case, candidate: Any, training: TrainConfig) -> None:
    """A sanity check before anything is compared: the run learns."""
    losses = trained(case.build(candidate), case, training)["losses"]
    assert losses[-1] < losses[0]


@each_run
@pytest.mark.parametrize("case", ["untied", "dora"], indirect=True)
def test_losses_and_factors_equal_the_reference(case: Case, judge: Judge, training: TrainConfig) -> None:
    """Twenty updates of AdamW, ten of SGD, against torch.optim with its defaults."""
    judge(case, lambda trainer: trained(trainer, case, training), training.iters * case.longest_sum)


@pytest.mark.parametrize("case", ["untied", "dora"], indirect=True)
def test_between_updates_everything_is_computed_with_the_newest_factors(case: Case, judge: Judge) -> None:
    """Loss and logits before, between and after two updates: nothing of an earlier evaluation is kept."""

    def act(trainer: Any) -> Arrays:
        results: Arrays = {}
        for update in range(3):
            if update:
                trainer.train([[case.batch]], replace(RUNS["adamw"], iters=1))
            results[f"nats after {update} updates"] = np.array(trainer.loss(case.batch)[0])
            results[f"logits after {update} updates"] = trainer.logits(case.batch.inputs_BT)
        return results

    judge(case, act)


def test_a_run_on_rows_with_a_common_prefix_equals_the_reference(case: Case, judge: Judge) -> None:
    """A trainer may compute a common prefix once; the trained adapter must be the same."""
    batch, training = one_prompt_batch(case.spec.vocab_size), RUNS["adamw"]
    judge(case, lambda trainer: trained(trainer, case, training, batch), training.iters * case.longest_sum)


def test_a_run_that_starts_at_zero_b_equals_the_reference(case: Case, judge: Judge) -> None:
    """Every real run starts so. A has no gradient in the first update, so Adam's second moment of A is 0."""
    zero, training = case.with_zero_b(), RUNS["adamw"]
    judge(zero, lambda trainer: trained(trainer, zero, training), training.iters * case.longest_sum)


def test_the_schedule_reaches_the_optimizer(case: Case, judge: Judge) -> None:
    """Warmup and cosine in a real run: a schedule can be right in the log and still never be used."""
    judge(case, lambda t: trained(t, case, SCHEDULED), SCHEDULED.iters * case.longest_sum)


@each_run
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_same_seed_gives_the_same_bits(
    case: Case, candidate: Any, judge: Judge, training: TrainConfig, dropout: float
) -> None:
    """The dropout masks come from the run's seed as well."""
    dropping, training = case.with_dropout(dropout), replace(training, iters=4)
    one, other = (trained(dropping.build(candidate), case, training) for _ in range(2))
    judge.same_bits(one, other)
