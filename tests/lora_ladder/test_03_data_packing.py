"""Rung 3, data: packed rows hold whole examples and little padding, and tell their examples apart.

Source: Krell et al. 2021, "Efficient Sequence Packing", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.lora_ladder.epochs import CAPACITY, settings, whole_epochs
from tests.lora_ladder.examples import Row, make_examples, num_inputs, places_in, random_lengths, small_case
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Examples

needs_batches = pytest.mark.needs("micro_batches")


@needs_batches
def test_packed_rows_hold_what_fits_and_no_more(judge: Judge) -> None:
    """At most `max_seq_length` inputs, but for an example that is longer alone; no two rows would fit in one.

    The second is so for best fit, first fit and any other rule that begins a row only if it must. Pairs of
    examples fill their row to the last position.
    """
    lengths = [*random_lengths(20), *([CAPACITY // 2 + 1] * 6), 11, CAPACITY - 8, CAPACITY + 6]
    examples = make_examples(lengths)
    for epoch in whole_epochs(judge, examples, settings("packed", len(lengths))):
        rows = [row for window in epoch for batch in window for row in batch]
        require_well_packed(judge, rows, list(map(num_inputs, examples)))


def require_well_packed(judge: Judge, rows: Sequence[Row], sizes: Sequence[int]) -> None:
    inputs = sorted(sum(sizes[n] for n in row) for row in rows if sizes[row[0]] <= CAPACITY or len(row) > 1)
    least, second, most = *inputs[:2], inputs[-1]
    judge.claim(most <= CAPACITY, f"a row has {most} inputs, where at most {CAPACITY} were asked for")
    judge.claim(
        least + second > CAPACITY, f"rows of {least} and {second} inputs would fit in one of {CAPACITY}"
    )


@needs_batches
def test_segments_tell_the_examples_of_a_packed_row_apart(candidate: Any, judge: Judge) -> None:
    """All inputs of an example have one segment number, which no other example of the row has."""
    examples = make_examples(random_lengths(23))
    windows = small_case().build(candidate).micro_batches(examples, settings("packed", 23, 3, 2))
    batches = [batch for window in windows for batch in window]
    assert any(len(places_in(batch, examples)) > len(batch.inputs_BT) for batch in batches)
    for batch in batches:
        require_segments(judge, batch, examples)


@needs_batches
def test_examples_are_told_apart_whatever_the_other_rows_hold(candidate: Any, judge: Judge) -> None:
    """In batches whose first row has one example and a later one several, and the other way round."""
    examples = make_examples([*([CAPACITY + 1] * 6), *random_lengths(18)])
    windows = small_case().build(candidate).micro_batches(examples, settings("packed", 24))
    batches = [batch for window in windows for batch in window]
    held = [[place.row for place in places_in(batch, examples)] for batch in batches]
    shared = [[rows.count(row) > 1 for row in sorted(set(rows))] for rows in held]
    assert [False, True] in shared and [True, False] in shared
    for batch in batches:
        if len(places_in(batch, examples)) > len(batch.inputs_BT):
            require_segments(judge, batch, examples)


def require_segments(judge: Judge, batch: Any, examples: Examples) -> None:
    judge.claim(batch.segment_BT is not None, "the batch must have segments, to tell its examples apart")
    taken: dict[tuple[int, int], int] = {}
    for place in places_in(batch, examples):
        end = place.start + num_inputs(examples[place.number])
        found = batch.segment_BT[place.row, place.start : end].tolist()
        message = f"example {place.number}, at {place.start} to {end} of its row, has the segments {found}"
        judge.claim(len(set(found)) == 1, message)
        other = taken.setdefault((place.row, found[0]), place.number)
        message = f"examples {other} and {place.number} of a row have the same segment {found[0]}"
        judge.claim(other == place.number, message)
