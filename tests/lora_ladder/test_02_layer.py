"""Rung 2, layer: an adapted linear layer computes with W + scale * (A B)^T, and only the named layers do.

Names and shapes are checked before any number: if they differ, every later comparison is meaningless. Then
the trainer is compared with itself: base plus adapter must give the logits of the merged weights, whatever
the rest of the forward pass is. MLX: `update_modules` puts a wrapped layer into the module tree; one that is
only assigned to a list, or forgotten, silently leaves the base layer in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.derived import Divergence, require_same_names
from tests.lora_ladder.cases import LORA, VARIANTS, Case, every_case, every_variant, merged_weights
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays


def shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def require_mapping(what: str, ours: Arrays, expected: Arrays) -> None:
    __tracebackhide__ = True
    require_same_names(what, ours, expected)
    wrong = {n: s for n, s in shapes(ours).items() if s != expected[n].shape}
    if wrong:
        name = next(iter(wrong))
        raise Divergence(f"{what}: {name} has shape {wrong[name]}, expected {expected[name].shape}")


@every_case
def test_names_and_shapes_are_the_canonical_ones(case: Case, candidate: Any, judge: Judge) -> None:
    """Of factors, base weights and gradients; and the trainer holds the values that it was given."""
    trainer = case.build(candidate)
    require_mapping("factors", trainer.factors(), case.factors)
    require_mapping("base", trainer.base(), case.weights)
    require_mapping("gradients", trainer.gradients(case.batch), case.factors)
    judge.same_bits({**trainer.factors(), **trainer.base()}, {**case.factors, **case.weights})


@every_variant
def test_the_adapted_layers_are_those_that_the_configuration_names(case: Case, candidate: Any) -> None:
    """Compared with a list written here by hand: 7 linears in each of 2 layers, or fewer."""
    factors = case.build(candidate).factors()
    adapted = {name.removesuffix(".lora_a") for name in factors if name.endswith("lora_a")}
    names = {n.removesuffix(".weight") for n in case.weights if n.endswith("_proj.weight")}
    rules: dict[str, Callable[[str], bool]] = {
        "some": lambda name: name.endswith(("q_proj", "mlp.down_proj")),
        "regex": lambda name: name.startswith("model.layers.0.") and name.endswith(("k_proj", "v_proj")),
        "last layer": lambda name: name.startswith("model.layers.1."),
    }
    assert adapted == {name for name in names if case.name not in rules or rules[case.name](name)}


@pytest.mark.parametrize("case", ["untied", "patterns"], indirect=True)
def test_the_trainable_count_is_rank_times_inputs_plus_outputs(case: Case, candidate: Any) -> None:
    """R (I + O) parameters for each adapted linear."""
    ranks = {"self_attn.q_proj": 2, "1.mlp": 5} if case.name == "patterns" else {}
    expected = 0
    for name, weight in case.weights.items():
        if name.endswith("_proj.weight"):
            rank = next((r for part, r in ranks.items() if part in name), LORA.rank)
            expected += rank * sum(weight.shape)
    assert sum(value.size for value in case.build(candidate).factors().values()) == expected


@pytest.mark.parametrize("case", [name for name in VARIANTS if name != "dora"], indirect=True)
def test_an_adapter_with_zero_b_is_exactly_the_base_model(case: Case, candidate: Any, judge: Judge) -> None:
    """x A 0 adds exact zeros, so the logits are equal to the bit."""
    tokens_BT = case.batch.inputs_BT
    base = case.bare().build(candidate).logits(tokens_BT)
    ours = {"logits": case.with_zero_b().build(candidate).logits(tokens_BT)}
    judge.same_computation(ours, {"logits": base}, case.longest_sum)


@pytest.mark.parametrize("case", ["untied", "patterns", "dora"], indirect=True)
def test_each_adapter_with_nonzero_b_changes_the_logits(case: Case, candidate: Any) -> None:
    """The control of the test above: the forward pass really uses every adapted layer."""
    tokens_BT = case.batch.inputs_BT
    logits_BTV = case.build(candidate).logits(tokens_BT)
    for name, value in case.factors.items():
        if name.endswith("lora_b"):
            without = replace(case, factors={**case.factors, name: 0 * value}).build(candidate)
            assert not np.array_equal(without.logits(tokens_BT), logits_BTV), f"{name} does nothing"


@every_case
def test_base_plus_adapter_equals_the_merged_weights(case: Case, candidate: Any, judge: Judge) -> None:
    """W x + scale (x A) B = (W + scale (A B)^T) x; with DoRA, each merged row has its magnitude as length."""

    def logits(trainer: Any) -> Arrays:
        return {"logits": trainer.logits(case.batch.inputs_BT)}

    judge.alike((case, logits), (case.bare(merged_weights(case, candidate.dialect)), logits))
