"""What makes a step's time and memory grow, and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cases import CASES, SMALL
from benchmarks.conftest import Record
from benchmarks.flops import StepFlops
from benchmarks.growth import judge_growth
from benchmarks.memory_run import compare_with_model
from benchmarks.worker import Side, call

BASE = CASES["small"]
# Nearly all arithmetic is in the head, so a head computed at prompt positions would show.
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
    """A row attends only to itself, so attention too is linear in the number of rows."""
    growth = call(judge_growth, replace(BASE, batch_size=8), BASE, 2.0)
    record(growth.seconds, **growth.verdict.record)
    assert not growth.verdict.is_failure, growth.verdict.sentence


def test_twice_the_tokens_a_row_take_at_most_twice_the_time_outside_attention(record: Record) -> None:
    """Attention scores are quadratic, so their share of the arithmetic is added to the allowed ratio."""
    longer = replace(BASE, tokens=2 * BASE.tokens)
    flops = flops_of(longer)
    at_most = 2 * (1 + flops.attention / flops.total / 2)
    growth = call(judge_growth, longer, BASE, at_most)
    record(growth.seconds, **growth.verdict.record)
    assert not growth.verdict.is_failure, growth.verdict.sentence


def test_prompt_tokens_cost_the_head_no_time(record: Record) -> None:
    """With four times the tokens and the same targets the small share of the blocks grows, the head's not."""
    at_most = (
        flops_of(LONG_PROMPT).total / flops_of(SHORT_PROMPT).total * 1.1
    )  # elementwise work of the block
    assert at_most < 2  # a head at all positions would take 4
    growth = call(judge_growth, LONG_PROMPT, SHORT_PROMPT, at_most)
    record(growth.seconds, **growth.verdict.record)
    assert not growth.verdict.is_failure, growth.verdict.sentence


def test_prompt_tokens_cost_the_head_no_memory(record: Record) -> None:
    """A large vocabulary adds the same bytes to the peak with a short and with a long prompt."""
    added = []
    for case in (SHORT_PROMPT, LONG_PROMPT):
        few_words = replace(case, model=replace(HEAVY_HEAD, vocab_size=1024))
        many, few = (call(compare_with_model, c) for c in (case, few_words))
        added.append(many.measured.peak_bytes - few.measured.peak_bytes)
    record(many.seconds, added_bytes=added)
    assert added[1] == pytest.approx(added[0], rel=0.02)


def test_micro_batches_cost_no_memory(record: Record) -> None:
    """Eight micro-batches add at most two copies of the gradients to the peak of one."""
    many, one = (call(compare_with_model, replace(BASE, micro_batches=number)) for number in (8, 1))
    record(many.seconds, peak_bytes=many.measured.peak_bytes, of_one=one.measured.peak_bytes)
    copy = 4 * one.shapes.trained_numbers
    assert many.measured.peak_bytes <= one.measured.peak_bytes * 1.02 + 2 * copy
