"""The model FLOPs of a step, compared with counts by hand and from the model's arrays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mlx.utils import tree_flatten

from benchmarks.cases import SMALL, TINYLLAMA
from benchmarks.flops import Work, linear_shapes, step_flops, utilisation, work_of
from mlx_impl.config import BLOCK_LINEARS, LoRAConfig
from mlx_impl.data import Example, make_batch
from mlx_impl.lora import add_lora, lora_layers
from mlx_impl.model import CausalLM

WORK = Work(
    num_positions=4096, num_tokens=4000, num_distinct=3000, num_targets=1000, num_pairs=4 * 1024 * 1024
)


def test_the_shapes_are_those_of_the_models_linears() -> None:
    model = CausalLM(SMALL)
    add_lora(model, LoRAConfig(rank=8))
    block = {
        n.rpartition(".")[2]: m for n, m in lora_layers(model).items() if n.startswith("model.layers.0.")
    }
    assert tuple(linear_shapes(SMALL)) == BLOCK_LINEARS
    for name, (num_in, num_out) in linear_shapes(SMALL).items():
        assert block[name].linear.weight.shape == (num_out, num_in)
        assert block[name].lora_a.shape == (num_in, 8) and block[name].lora_b.shape == (8, num_out)


def test_frozen_weights_take_4_flops_a_weight_and_position_and_factors_6() -> None:
    model = CausalLM(SMALL)
    add_lora(model, LoRAConfig(rank=8))
    trained = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    base = sum(layer.linear.weight.size for layer in lora_layers(model).values())
    flops = step_flops(SMALL, 8, WORK)
    assert flops.blocks == 4 * base * WORK.num_tokens
    assert flops.factors == 6 * trained * WORK.num_tokens


def test_repeated_prefixes_are_counted_separately() -> None:
    flops = step_flops(SMALL, 8, WORK)
    assert flops.repeated == (flops.blocks + flops.factors) // 4


def test_a_shared_prefix_counts_once_and_an_untrained_row_not_at_all() -> None:
    rows = [Example((1, 2, 3, *own), (False,) * 5 + (True,)) for own in ((4, 5, 6), (4, 6, 6), (5, 5, 6))]
    untrained = Example((7, 8, 9), (False,) * 3)
    work = work_of([[make_batch([*rows, untrained])]])
    assert (work.num_tokens, work.num_distinct) == (3 * 5 + 2, 3 + 2 + 3)  # 1 2 3; 4, 5; 5, 6, 5


def test_the_head_counts_at_targets_only() -> None:
    assert step_flops(SMALL, 8, WORK).head == 4 * 256 * 4096 * 1000


def test_attention_is_palms_twelve_per_layer_head_and_pair() -> None:
    assert step_flops(SMALL, 8, WORK).attention == 12 * 4 * 4 * 64 * WORK.num_pairs


def test_tinyllama_at_4_times_1024_is_the_known_17_teraflop() -> None:
    """4 FLOP x 1.03e9 weights x 4096 tokens with the head, and attention beside it."""
    work = replace(WORK, num_tokens=4096, num_targets=4096)
    flops = step_flops(TINYLLAMA, 8, work)
    assert flops.blocks + flops.head == pytest.approx(16.9e12, rel=0.01)


def test_no_targets_cost_no_head() -> None:
    assert step_flops(SMALL, 8, replace(WORK, num_targets=0)).head == 0


def test_utilisation_is_one_where_the_step_runs_at_the_measured_rate() -> None:
    assert utilisation(flops=10**12, seconds=2.0, rate=5e11) == 1.0
