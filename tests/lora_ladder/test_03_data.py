"""Rung 3, data: what a run trains on. Every example once an epoch, every token in its place.

The batches are those that reach the training step. They are read back into examples (`examples.py`), so it
does not matter how a trainer makes them. MLX: a `take` past the end of an array reads something and raises
nothing, so a wrong index goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.lora_ladder.epochs import EPOCHS, each_batching, settings, whole_epochs
from tests.lora_ladder.examples import (
    make_examples,
    named_contents,
    num_inputs,
    places_in,
    random_lengths,
    small_case,
)
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Examples

# (examples, batch_size, grad_accumulation_steps): no remainder, remainders of both, one batch and less, more
# batches than a trainer may sort at once, more examples than a byte can count.
SIZES = [(8, 2, 2), (23, 3, 2), (19, 2, 3), (1, 1, 1), (2, 4, 2), (53, 1, 4), (259, 32, 1)]
needs_batches = pytest.mark.needs("micro_batches")


def portions(total: int, size: int) -> list[int]:
    """Equal portions, and the rest."""
    return [size] * (total // size) + [total % size] * bool(total % size)


@needs_batches
@each_batching
@pytest.mark.parametrize(("num_examples", "size", "steps"), SIZES)
def test_each_example_is_trained_once_an_epoch_in_batches_of_the_size_asked_for(
    judge: Judge, batching: str, num_examples: int, size: int, steps: int
) -> None:
    """What is left at the end of an epoch makes a smaller batch, and a window of fewer micro-batches."""
    examples = make_examples(random_lengths(num_examples))
    epochs = whole_epochs(judge, examples, settings(batching, num_examples, size, steps))
    assert len(epochs) >= EPOCHS
    for epoch in epochs:
        rows = [len(batch) for window in epoch for batch in window]
        if batching == "grouped":  # its batches come in random order
            rows.sort(reverse=True)
        names = "rows of an epoch's micro-batches", "micro-batches of an epoch's windows"
        ours = np.array(rows), np.array([len(window) for window in epoch])
        expected = np.array(portions(sum(rows), size)), np.array(portions(len(rows), steps))
        judge.same_bits(dict(zip(names, ours, strict=True)), dict(zip(names, expected, strict=True)))


EVERY_LENGTH = [*range(2, 71), 300]
CONTENTS: dict[str, tuple[Callable[[], Examples], int]] = {
    "every length": (lambda: make_examples(EVERY_LENGTH), 809),
    "ids beyond 16 bits": (lambda: make_examples(random_lengths(9), first_tokens=69_000), 70_001),
}


@needs_batches
@each_batching
@pytest.mark.parametrize("name", CONTENTS)
def test_every_token_and_every_flag_of_an_example_is_in_its_place(
    candidate: Any, judge: Judge, name: str, batching: str
) -> None:
    """Position t predicts token t + 1; a flag stays with its token; padding is never a target.

    An example ends with its last target. None is cut, not even one that is longer than a packed row.
    """
    make, vocab_size = CONTENTS[name]
    examples, size = make(), 3 if batching == "packed" else 1
    training = replace(settings(batching, 1, size), iters=-(-len(make()) // size))
    windows = small_case(vocab_size).build(candidate).micro_batches(examples, training)
    contents = judge.report(lambda: list(named_contents(windows, examples)))
    judge.same_bits({name: ours for name, ours, _ in contents}, {name: x for name, _, x in contents})


@needs_batches
@each_batching
def test_a_batch_counts_its_inputs_without_padding(candidate: Any, judge: Judge, batching: str) -> None:
    """An example of n tokens has n - 1 inputs."""
    examples = make_examples(random_lengths(11))
    windows = small_case().build(candidate).micro_batches(examples, settings(batching, 11, 3))
    for update, window in enumerate(windows, 1):
        for batch in window:
            places, name = places_in(batch, examples), f"num_tokens in update {update}"
            expected = sum(num_inputs(examples[place.number]) for place in places)
            judge.same_bits({name: batch.num_tokens}, {name: expected})


@needs_batches
def test_the_examples_of_a_grouped_batch_are_of_like_length(judge: Judge) -> None:
    """Less than a quarter of the padding of plain batches."""
    examples = make_examples([2 + n % 24 for n in np.random.default_rng(5).permutation(96)])

    def padding(batching: str) -> int:
        batches = [
            b for window in whole_epochs(judge, examples, settings(batching, 96, 4))[0] for b in window
        ]
        sizes = [[num_inputs(examples[n]) for (n,) in batch] for batch in batches]
        return sum(len(batch) * max(batch) - sum(batch) for batch in sizes)

    grouped, plain = padding("grouped"), padding("plain")
    judge.claim(4 * grouped < plain, f"{grouped} positions of padding, {plain} in plain batches")
