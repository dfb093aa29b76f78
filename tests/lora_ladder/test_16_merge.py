"""Rung 16, merge: merged weights act as base and adapter did, and unmerging restores them.

A merged weight is right within the rounding of one sum; unmerging restores every byte. MLX: A B must be
transposed to the layout of the weight, and a base in half precision loses an update smaller than its
rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_impl.config import TrainConfig
from tests.derived import within
from tests.lora_ladder.cases import Case, every_case, every_variant, merged_weights
from tests.lora_ladder.extremes import ENDS, require_lost, with_number
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.test_15_options_quantized import built, each_variant


def merged_logits(trainer: Any, case: Case) -> Arrays:
    trainer.merge()
    return {"logits": trainer.logits(case.batch.inputs_BT)}


@pytest.mark.needs("merge")
@every_case
def test_merged_logits_are_those_of_the_adapter(case: Case, judge: Judge) -> None:
    """For every kind of adapter and of model: biases and norms stay."""
    judge.alike(
        (case, lambda trainer: merged_logits(trainer, case)),
        (case, lambda trainer: {"logits": trainer.logits(case.batch.inputs_BT)}),
    )


@pytest.mark.needs("merge")
@pytest.mark.alone
@every_variant
def test_a_merged_weight_is_the_sum(case: Case, judge: Judge, candidate: Any) -> None:
    """W + scale (A B)^T; with DoRA, rows scaled to the magnitudes as lengths. No other weight changes."""
    trainer = case.build(candidate)
    trainer.merge()
    ours, expected = trainer.base(), merged_weights(case, candidate.dialect)
    judge.require_names(ours, expected)
    judge.hold([within(n, ours[n], expected[n], 0.0, case.lora.rank + 1) for n in expected])


@pytest.mark.needs("merge")
def test_a_merged_weight_knows_nothing_of_dropout(case: Case, judge: Judge, candidate: Any) -> None:
    """Training has divided what it kept by 1 - p already. After an update, so in the mode of training."""
    trainer = case.with_dropout(0.5).build(candidate)
    trainer.train([[case.batch]], TrainConfig(iters=1, learning_rate=0.01))
    expected = merged_weights(replace(case, factors=trainer.factors()), candidate.dialect)
    trainer.merge()
    ours = trainer.base()
    judge.hold([within(n, ours[n], expected[n], 0.0, case.lora.rank + 1) for n in expected])


@pytest.mark.needs("merge", "in_4_bits")
@each_variant
def test_a_merged_weight_is_not_rounded_to_4_bits_again(candidate: Any, judge: Judge, variant: str) -> None:
    """The dequantized weight and what the adapter adds, which is smaller than a step of 4 bits."""
    case, trainer = built(candidate, variant)
    trainer.merge()
    ours, expected = trainer.base(), merged_weights(case, candidate.dialect)
    judge.require_names(ours, expected)
    judge.hold([within(n, ours[n], expected[n], 0.0, case.lora.rank + 1) for n in expected])


@pytest.mark.needs("merge", "unmerge")
@every_variant
def test_unmerging_restores_every_byte(case: Case, candidate: Any, judge: Judge) -> None:
    """Base, factors and logits, to the bit."""
    trainer = case.build(candidate)
    before = trainer.logits(case.batch.inputs_BT)
    trainer.merge()
    trainer.unmerge()
    restored = {**trainer.base(), **trainer.factors()}
    judge.same_computation(restored, {**case.weights, **case.factors}, case.lora.rank + 1)
    after = trainer.logits(case.batch.inputs_BT)
    judge.same_computation({"logits": after}, {"logits": before}, case.longest_sum)


@pytest.mark.needs("merge")
@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS)
def test_a_number_that_ends_in_a_factor_reaches_the_merged_weight(
    case: Case, judge: Judge, number: float
) -> None:
    """Or the merge is refused."""
    ruined = with_number(case, "model.layers.0.self_attn.o_proj.lora_b", number)
    require_lost(judge, ruined, lambda trainer: merged_logits(trainer, case), f"{number} in a B")


@pytest.mark.needs("merge", "unmerge")
@every_variant
def test_after_unmerging_training_goes_on(case: Case, candidate: Any, judge: Judge) -> None:
    """All factors train again, and nothing else: the same factors and base as without merging, to the bit."""
    merged, other = case.build(candidate), case.build(candidate)
    merged.merge()
    merged.unmerge()
    for trainer in (merged, other):
        trainer.train([[case.batch]], TrainConfig(iters=1, learning_rate=0.01))
    ours, expected = ({**trainer.factors(), **trainer.base()} for trainer in (merged, other))
    judge.same_computation(ours, expected, case.longest_sum)


@pytest.mark.needs("merge", "unmerge")
@every_variant
def test_a_second_merge_is_that_of_the_factors_at_that_time(case: Case, candidate: Any, judge: Judge) -> None:
    """Merged, unmerged and trained on, the model gets the new update, and unmerging restores every byte."""
    trainer = case.build(candidate)
    trainer.merge()
    trainer.unmerge()
    trainer.train([[case.batch]], TrainConfig(iters=1, learning_rate=0.05))
    now = replace(case, factors=trainer.factors())
    trainer.merge()
    ours, expected = trainer.base(), merged_weights(now, candidate.dialect)
    judge.require_names(ours, expected)
    judge.hold([within(n, ours[n], expected[n], 0.0, case.lora.rank + 1) for n in expected])
    trainer.unmerge()
    restored = {**trainer.base(), **trainer.factors()}
    judge.same_computation(restored, {**case.weights, **now.factors}, case.lora.rank + 1)
