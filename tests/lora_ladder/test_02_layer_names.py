"""Rung 2, layer: in a model of twelve layers, names end at a dot: layer 1 is neither layer 10 nor layer 11.

A model of a few layers cannot tell. The names and ranks expected here are those of PEFT's rules
(`check_target_module_exists`, `get_pattern_key`), as reference/targets.py has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_impl.config import LoRAConfig
from tests.lora_ladder.cases import LORA, SPEC, Case, make_factors, make_weights, merged_weights
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.test_02_layer import require_mapping

TWELVE = replace(
    SPEC,
    num_hidden_layers=12,
    hidden_size=12,
    intermediate_size=20,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
ADAPTERS = {
    "the end of a name": replace(LORA, target_modules=("1.self_attn.q_proj", "0.mlp.up_proj", "o_proj")),
    "whole names": replace(
        LORA, target_modules=("model.layers.1.mlp.down_proj", "model.layers.11.self_attn.v_proj")
    ),
    "an expression": replace(
        LORA, target_modules=r".*\.1\.mlp\.\w+|model\.layers\.(2|10)\.self_attn\.q_proj"
    ),
    "ranks": replace(LORA, rank_pattern={r"1\.self_attn\.[qv]_proj": 2, r"0\.mlp\.\w+": 1}),
    "alphas": replace(LORA, alpha_pattern={r"1\.self_attn\.\w+": 2.5, r"0\.mlp\.up_proj": 12.0}),
    "an alpha of a linear with a rank": replace(
        LORA,
        rank_pattern={r"1\.mlp\.\w+": 1},
        alpha_pattern={r"1\.mlp\.up_proj": 5.0},
    ),
    "the last three layers": replace(LORA, num_layers=3),
    "an end of a name in the last eleven layers": replace(
        LORA, num_layers=11, target_modules=("1.mlp.gate_proj", "v_proj")
    ),
}
each_adapter = pytest.mark.parametrize("name", ADAPTERS)


def adapted(name: str) -> Case:
    lora: LoRAConfig = ADAPTERS[name]
    weights = make_weights(TWELVE)
    return Case(name, TWELVE, lora, weights, make_factors(TWELVE, lora, weights))


@each_adapter
def test_of_twelve_layers_those_that_are_named_are_adapted(candidate: Any, judge: Judge, name: str) -> None:
    """Names and shapes of the factors, and of the gradients."""
    case = adapted(name)
    trainer = case.build(candidate)
    require_mapping("factors", trainer.factors(), case.factors)
    require_mapping("gradients", trainer.gradients(case.batch), case.factors)


@pytest.mark.parametrize("name", ["alphas", "an alpha of a linear with a rank"])
def test_of_twelve_layers_each_has_its_own_scale(candidate: Any, judge: Judge, name: str) -> None:
    """Base plus adapter are the merged weights, each linear with the rank and alpha of its name."""
    case = adapted(name)

    def logits(trainer: Any) -> Arrays:
        return {"logits": trainer.logits(case.batch.inputs_BT)}

    judge.alike((case, logits), (case.bare(merged_weights(case, candidate.dialect)), logits))
