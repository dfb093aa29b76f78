"""Which linears get an adapter: PEFT's rules, each judged by hand; what matches nothing is an error."""

from __future__ import annotations

import math

import pytest

from mlx_impl.config import LoRAConfig
from mlx_impl.model import CausalLM
from mlx_impl.targets import select_targets
from tests.lora_ladder.cases import SPEC

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def names(**settings: object) -> list[str]:
    config = LoRAConfig(rank=2, **settings)  # type: ignore[arg-type]
    return [target.name for target in select_targets(CausalLM(SPEC), config)]


def test_the_last_n_layers_are_adapted() -> None:
    assert len(names(num_layers=1)) == 7
    assert all(name.startswith("model.layers.1.") for name in names(num_layers=1))


def test_a_target_is_a_name_or_the_end_of_one() -> None:
    """Whole parts only, so "proj" is no target and "mlp.up_proj" is."""
    assert names(target_modules=("mlp.up_proj",)) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]
    with pytest.raises(ValueError, match=r"target modules must be among down_proj, .* got proj$"):
        names(target_modules=("proj",))


def test_an_expression_must_match_the_whole_name() -> None:
    chosen = names(target_modules=r".*self_attn\.[a-z]_proj", num_layers=1)
    assert chosen == [f"model.layers.1.self_attn.{name}" for name in ATTENTION]
    with pytest.raises(ValueError, match=r"'q_proj' must match the whole name of a linear, such as model\."):
        names(target_modules="q_proj")


def test_all_linear_leaves_out_the_head() -> None:
    assert len(names(target_modules="all-linear")) == 14
    with pytest.raises(ValueError, match="got lm_head"):
        names(target_modules=("lm_head",))


def test_the_first_pattern_that_matches_the_end_of_a_name_decides() -> None:
    """As in PEFT: a pattern is an expression for the last parts of the name."""
    config = LoRAConfig(
        rank=8,
        alpha=16.0,
        rank_pattern={r"1\.self_attn\.q_proj": 2, "q_proj": 4},
        alpha_pattern={"mlp.down_proj": 6.0},
    )
    targets = {target.name: target for target in select_targets(CausalLM(SPEC), config)}
    assert targets["model.layers.1.self_attn.q_proj"].rank == 2
    assert targets["model.layers.0.self_attn.q_proj"].rank == 4
    assert targets["model.layers.0.self_attn.v_proj"].rank == 8
    assert targets["model.layers.0.self_attn.q_proj"].scale == 16 / 4
    assert targets["model.layers.0.mlp.down_proj"].scale == 6 / 8


def test_rslora_divides_by_the_root_of_each_linears_own_rank() -> None:
    config = LoRAConfig(rank=3, alpha=7.0, use_rslora=True, rank_pattern={"q_proj": 2})
    scales = {t.name.rpartition(".")[2]: t.scale for t in select_targets(CausalLM(SPEC), config)}
    assert scales["q_proj"] == 7 / math.sqrt(2)
    assert scales["k_proj"] == 7 / math.sqrt(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ()}, "got none"),
        ({"target_modules": ("q_proj", "w1")}, "got w1"),
        ({"target_modules": "["}, r"'\[' must be a regular expression: unterminated character set"),
        ({"num_layers": 3}, "num_layers must be at most the model's 2, got 3"),
        ({"rank_pattern": {"w1": 3}}, "rank_pattern must match targeted linears, and 'w1' matches none"),
        (
            {"target_modules": ("q_proj",), "alpha_pattern": {"v_proj": 3.0}},
            "alpha_pattern must match targeted linears, and 'v_proj' matches none",
        ),
        ({"rank_pattern": {"k_proj": 21}}, "rank must be at most 20, the smaller side of"),
        ({"rank_pattern": {"k_proj": 0}}, r"rank_pattern\['k_proj'\] must be at least 1, got 0"),
        ({"alpha_pattern": {"k_proj": -1.0}}, r"alpha_pattern\['k_proj'\] must be finite and positive"),
    ],
)
def test_what_matches_nothing_is_an_error(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(**settings)
