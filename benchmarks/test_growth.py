"""What a step's cost grows with, and what it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cases import CASES, SMALL
from benchmarks.conftest import Record
from benchmarks.flops import StepFlops
from benchmarks.growth import judge_growth
from benchmarks.memory_run import held_against_model
from benchmarks.worker import Side, call

BASE = CASES["small"]
# Nearly all of its arithmetic is the head's: a prompt that went through it would show.
HEAVY_HEAD = replace(
    SMALL,
    vocab_size=32768,
    num_hidden_layers=1,
    intermediate_size=64,
    num_attention_heads=1,
    num_key_value_heads=1,
)
SHORT_PROMPT = replace(BASE, model=HEAVY_HEAD, tokens=32, target_share=1 / 2)
LONG_PROMPT = replace(SHORT_PROMPT, tokens=128, target_share=1 / 8)  # four times the tokens, as many targets


def flops_of(case: object) -> StepFlops:
    with Side("ours", case) as side:  # type: ignore[arg-type]
        return side.hello.flops


def test_twice_the_rows_take_at_most_twice_the_time(record: Record) -> None:
    """Linear in tokens: rows attend to themselves alone, so attention is linear in their number too."""
    growth = call(judge_growth, replace(BASE, batch_size=8), BASE, 2.0)
    record(growth.seconds, **growth.verdict.record)
    assert not growth.verdict.is_failure, growth.verdict.sentence


def test_twice_the_tokens_a_row_take_at_most_twice_the_time_outside_attention(record: Record) -> None:
    """Attention's own scores are quadratic: their share of the arithmetic is added to the two times."""
    longer = replace(BASE, tokens=2 * BASE.tokens)
    flops = flops_of(longer)
    at_most = 2 * (1 + flops.attention / flops.total / 2)
    growth = call(judge_growth, longer, BASE, at_most)
    record(growth.seconds, **growth.verdict.record)
    assert not growth.verdict.is_failure, growth.verdict.sentence


def test_prompt_tokens_cost_the_head_no_time(record: Record) -> None:
    """Four times the tokens and the same targets: the blocks' small share grows, the head's does not."""
    at_most = (
        flops_of(LONG_PROMPT).total / flops_of(SHORT_PROMPT).total * 1.1
    )  # elementwise work of the block
    assert at_most < 2  # of the 4 that a head over all positions would take
    growth = call(judge_growth, LONG_PROMPT, SHORT_PROMPT, at_most)
    record(growth.seconds, **growth.verdict.record)
    assert not growth.verdict.is_failure, growth.verdict.sentence


def test_prompt_tokens_cost_the_head_no_memory(record: Record) -> None:
    """What a large vocabulary adds to the peak is the same for a short and a long prompt."""
    added = []
    for case in (SHORT_PROMPT, LONG_PROMPT):
        few_words = replace(case, model=replace(HEAVY_HEAD, vocab_size=1024))
        many, few = (call(held_against_model, c) for c in (case, few_words))
        added.append(many.measured.peak_bytes - few.measured.peak_bytes)
    record(many.seconds, added_bytes=added)
    assert added[1] == pytest.approx(added[0], rel=0.02)


def test_micro_batches_cost_no_memory(record: Record) -> None:
    """Eight of them leave the peak of one, but for two more copies of the gradients."""
    many, one = (call(held_against_model, replace(BASE, micro_batches=number)) for number in (8, 1))
    record(many.seconds, peak_bytes=many.measured.peak_bytes, of_one=one.measured.peak_bytes)
    copy = 4 * one.shapes.trained_numbers
    assert many.measured.peak_bytes <= one.measured.peak_bytes * 1.02 + 2 * copy
