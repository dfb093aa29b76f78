"""Rung 15, options: a base in 4 bits (QLoRA) is computed with as it is stored, and passes gradients on.

The trainer quantizes the weights that it is given. The reference gets what comes out of that, dequantized: so
nothing is claimed of how a trainer rounds, but that it computes with the weights that it has.
Source: Dettmers et al. 2023, "QLoRA", section 3.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.lora_ladder.cases import (
    SPEC,
    VARIANTS,
    Case,
    make_batch,
    make_factors,
    make_weights,
    random_rows,
)
from tests.lora_ladder.chance import require_uniform
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays

BITS, LEAST_GROUP = 4, 32
# Every linear's inputs are a multiple of the groups that MLX knows.
DIVISIBLE = replace(SPEC, hidden_size=128, intermediate_size=256, num_attention_heads=16, head_dim=8)
BATCH = make_batch(random_rows(DIVISIBLE.vocab_size, (9, 5, 12)), (3, 1, 4))

pytestmark = pytest.mark.needs("in_4_bits")
BIASED = "some, biased"  # keys and values have a bias and no adapter
each_variant = pytest.mark.parametrize("variant", ["lora", "dora", BIASED])


def built(candidate: Any, variant: str) -> tuple[Case, Any]:
    """A case with the weights that the trainer has after quantizing them, and that trainer."""
    spec = replace(DIVISIBLE, qkv_bias=variant == BIASED)
    lora, weights = VARIANTS["some" if variant == BIASED else variant], make_weights(spec)
    case = Case("quantized", spec, lora, weights, make_factors(spec, lora, weights))
    with candidate.in_4_bits():
        trainer = case.build(candidate)
    return replace(case, weights=trainer.base()), trainer


def test_a_base_in_4_bits_has_sixteen_values_a_group(candidate: Any, judge: Judge) -> None:
    """In every adapted linear; or nothing is quantized."""
    case, trainer = built(candidate, "lora")
    for name in (name for name in case.factors if name.endswith("lora_a")):
        weight_OI = trainer.base()[name.replace("lora_a", "weight")]
        most = max(len(np.unique(group)) for group in weight_OI.reshape(-1, LEAST_GROUP))
        judge.claim(most <= 2**BITS, f"{name}: expected at most 16 values in a group of 32, got {most}")


def loss_and_gradients(trainer: Any) -> Arrays:
    nats, num_targets = trainer.loss(BATCH)
    return {"nats": np.array(nats), "num_targets": np.array(num_targets), **trainer.gradients(BATCH)}


@each_variant
def test_loss_and_gradients_are_those_of_the_dequantized_base(
    candidate: Any, judge: Judge, variant: str
) -> None:
    """Gradients reach the lower layers through the quantized weights too."""
    case, trainer = built(candidate, variant)
    judge.given(loss_and_gradients(trainer), case, loss_and_gradients)


@each_variant
def test_updates_are_those_of_the_dequantized_base(candidate: Any, judge: Judge, variant: str) -> None:
    """Three of them, and no weight of the base has changed."""
    case, trainer = built(candidate, variant)
    act = partial(trained, training=TrainConfig(iters=3, learning_rate=0.01))
    judge.given(act(trainer), case, act)
    judge.same_bits(trainer.base(), case.weights)


def trained(trainer: Any, training: TrainConfig) -> Arrays:
    losses = trainer.train([[BATCH]] * training.iters, training)
    return {"losses": np.array(losses), **trainer.factors()}


@pytest.mark.needs("initial_factors")
def test_dora_begins_with_the_lengths_of_the_dequantized_rows(candidate: Any, judge: Judge) -> None:
    """Scale times level plus offset, as the base computes; so the first loss is the base model's."""
    _, trainer = built(candidate, "dora")
    factors, base = trainer.initial_factors(0), trainer.base()
    names = [name for name in factors if name.endswith("magnitude")]
    judge.claim(bool(names), "an adapter of DoRA must have magnitudes, and has none")
    rows = {name: base[name.replace("magnitude", "weight")].astype(np.float64) for name in names}
    lengths = {name: np.linalg.norm(weight_OI, axis=1) for name, weight_OI in rows.items()}
    judge.hold([judge.rounded(n, factors[n], lengths[n], rows[n].shape[1]) for n in names])


@pytest.mark.needs("initial_factors")
def test_a_begins_within_1_over_sqrt_i_of_the_inputs_and_not_of_the_packed_words(
    candidate: Any, judge: Judge
) -> None:
    """As for a base that is not quantized: U(-1 / sqrt(I), 1 / sqrt(I))."""
    _, trainer = built(candidate, "lora")
    factors = trainer.initial_factors(0)
    values = [a * np.sqrt(len(a)) for name, a in factors.items() if name.endswith("lora_a")]
    judge.report(
        lambda: require_uniform("A sqrt(I)", np.concatenate([v.flatten() for v in values]) * (1 - 2.0**-22))
    )
