"""Which examples share a row, a batch and an update: a pure function of the update's number.

plain (not the plain path, `--plain`): a batch is `batch_size` examples of the epoch's random order.
grouped: examples of similar length share a batch, to save padding. Within every POOL batches of the random
order the examples are sorted by length; then the batches are shuffled.
packed: a batch is `batch_size` rows, each of several examples with together at most `max_seq_length` inputs
(best-fit decreasing; Krell et al. 2021, "Efficient Sequence Packing", section 4). The rows are the same in
every epoch.

Every epoch takes each example once, in its own order. Nothing is dropped: the last batch may be smaller, and
the last update of an epoch may have fewer micro-batches.
Differs from reference/batching.py: packing finds the best fit by a sorted list; `window_rows` is given the
rows, which are the same in every epoch; `updates_an_epoch` is a function, because `--epochs` needs it; the
batches of an epoch are kept for its other updates.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

from .config import TrainConfig

Row = tuple[int, ...]  # numbers of the examples in a row of a batch, from 0; one, unless packed
POOL = 50  # batches within which "grouped" sorts by length


def rows_of(lengths: Sequence[int], config: TrainConfig) -> list[Row]:
    """The rows of an epoch; `lengths` are the examples' numbers of inputs."""
    if config.batching != "packed":
        return [(number,) for number in range(len(lengths))]
    return pack_rows(lengths, config.max_seq_length, config.data_seed)


def pack_rows(lengths: Sequence[int], capacity: int, seed: int) -> list[Row]:
    """Sequence packing: each example, the longest first, into the fullest row that has room for it.

    An example longer than the capacity gets its own row. Examples of one length come in random order.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (room, row), sorted
    for number in sorted(shuffled, key=lambda number: -lengths[number]):
        found = bisect_left(space, (lengths[number], -1))
        if found == len(space):
            rows.append([])
            room, row = max(capacity, lengths[number]), len(rows) - 1
        else:
            room, row = space.pop(found)
        rows[row].append(number)
        insort(space, (room - lengths[number], row))
    return [tuple(row) for row in rows]


def updates_an_epoch(lengths: Sequence[int], config: TrainConfig) -> int:
    return -(-len(rows_of(lengths, config)) // (config.batch_size * config.grad_accumulation_steps))


def window_rows(
    step: int, rows: Sequence[Row], lengths: Sequence[int], config: TrainConfig
) -> list[list[Row]]:
    """The rows of each micro-batch of update `step`, counted from 0."""
    size = config.batch_size * config.grad_accumulation_steps
    epoch, index = divmod(step, -(-len(rows) // size))
    batches = LAST_EPOCH.batches(epoch, rows, lengths, config)
    first = index * config.grad_accumulation_steps
    return [[rows[i] for i in batch] for batch in batches[first : first + config.grad_accumulation_steps]]


class Epoch:
    """The batches of an epoch, made for its first update and kept for the others."""

    def __init__(self) -> None:
        self.of: tuple[Any, ...] = ()  # what they were made of
        self.made: list[list[int]] = []

    def batches(
        self, epoch: int, rows: Sequence[Row], lengths: Sequence[int], config: TrainConfig
    ) -> list[list[int]]:
        """Numbers of rows; made again for another epoch, configuration, list of rows or of lengths."""
        how = epoch, config.data_seed, config.batch_size, config.batching
        if not self.of or self.of[0] is not rows or self.of[1] is not lengths or self.of[2] != how:
            self.of, self.made = (rows, lengths, how), epoch_batches(epoch, len(rows), lengths, config)
        return self.made


LAST_EPOCH = Epoch()


def epoch_batches(epoch: int, num_rows: int, lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
    random = np.random.default_rng([config.data_seed, epoch])
    batches = chunks(random.permutation(num_rows).tolist(), config.batch_size)
    return group_by_length(batches, lengths, random) if config.batching == "grouped" else batches


def chunks(numbers: Sequence[int], size: int) -> list[list[int]]:
    return [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]


def group_by_length(
    batches: list[list[int]], lengths: Sequence[int], random: np.random.Generator
) -> list[list[int]]:
    """The examples sorted by length within every POOL batches; then the batches in random order."""
    size, sorted_batches = len(batches[0]), []
    for start in range(0, len(batches), POOL):
        pool = [number for batch in batches[start : start + POOL] for number in batch]
        sorted_batches += chunks(sorted(pool, key=lambda number: lengths[number]), size)
    return [sorted_batches[i] for i in random.permutation(len(sorted_batches))]
