"""The memory model of the benchmarks: its sizes are those of the model, and it states what costs memory."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks import memory
from benchmarks.cases import SMALL
from benchmarks.memory import (
    AFTER,
    ATTENTION,
    BEFORE,
    HEAD,
    TRAINED,
    UPDATE,
    Kept,
    Shapes,
    budget_of,
    numbers,
)
from mlx_impl.config import LoRAConfig
from mlx_impl.fast import head
from mlx_impl.lora import add_lora, count_parameters
from mlx_impl.model import CausalLM

SHAPES = Shapes(SMALL, rank=8, rows=4, tokens=128, needed=512, targets=128)


@pytest.mark.parametrize("is_tied", [True, False])
def test_base_and_trained_numbers_are_those_of_the_model(is_tied: bool) -> None:
    config = replace(SMALL, tie_word_embeddings=is_tied)
    model = CausalLM(config)
    base = sum(array.size for _, array in tree_flatten(model.parameters()))
    add_lora(model, LoRAConfig(rank=8))
    shapes = replace(SHAPES, config=config)
    assert (shapes.trained_numbers, shapes.base_numbers) == (count_parameters(model)[0], base)
    assert budget_of(shapes).base == sum(a.nbytes for _, a in tree_flatten(model.parameters())) - 4 * (
        shapes.trained_numbers
    )


@pytest.mark.parametrize(
    "kept", [*ATTENTION, *BEFORE, *AFTER, *HEAD, *TRAINED, *UPDATE], ids=lambda kept: kept.what
)
def test_every_line_has_known_sizes_and_a_reason(kept: Kept) -> None:
    assert numbers((kept,), SHAPES.sizes) > 0 and kept.why


def test_numbers_per_position_are_the_product_of_the_axes() -> None:
    assert numbers((Kept("a", "HS", 2, ""), Kept("b", "1", 3, "")), SHAPES.sizes) == 2 * 4 * 128 + 3


def test_prompt_tokens_cost_the_head_nothing() -> None:
    """With twice the tokens and the same targets only the blocks grow."""
    large = replace(SHAPES, config=replace(SMALL, vocab_size=2**17))
    one, two = (budget_of(replace(large, rows=rows, needed=128 * rows)) for rows in (4, 8))
    assert 1.9 * one.blocks < two.blocks < 2 * one.blocks  # the last block's feed-forward stays
    assert two.working == one.working > one.blocks // SMALL.num_hidden_layers


def test_checkpointing_keeps_one_hidden_state_per_block() -> None:
    checkpointed = budget_of(replace(SHAPES, checkpointed=True))
    assert checkpointed.blocks == 4 * SMALL.num_hidden_layers * SHAPES.positions * SMALL.hidden_size
    assert checkpointed.peak_bytes < budget_of(SHAPES).peak_bytes


def test_bfloat16_halves_everything_except_the_float32_factors() -> None:
    full, half = budget_of(SHAPES), budget_of(replace(SHAPES, dtype="bfloat16"))
    assert (half.base, half.blocks) == (full.base // 2, full.blocks // 2)
    assert half.trained == full.trained == 6 * SHAPES.trained_numbers * mx.float32.size


def test_the_chunk_size_of_the_head_is_that_of_the_loss() -> None:
    assert memory.CHUNK_LOGITS == head.CHUNK_LOGITS


def test_padding_costs_attention_alone() -> None:
    """The last block's feed-forward keeps target positions only."""
    all_needed, half_needed = (budget_of(replace(SHAPES, needed=n, targets=8)) for n in (512, 256))
    of_attention = 4 * SHAPES.positions * SMALL.num_hidden_layers * numbers(ATTENTION, SHAPES.sizes)
    of_the_last = 4 * 8 * numbers(AFTER, SHAPES.sizes)
    rest, half = (budget.blocks - of_attention - of_the_last for budget in (all_needed, half_needed))
    assert rest == pytest.approx(2 * half)
