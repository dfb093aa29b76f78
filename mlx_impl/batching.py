"""Which examples share a row, a batch and an update: it follows from the update's number and the data seed.

plain (not the plain path, `--plain`): a batch is `batch_size` examples of the epoch's random order.
grouped: examples of similar length share a batch, to save padding. Within every POOL batches of the random
order the examples are sorted by length; then the batches are shuffled.
packed: a batch is `batch_size` rows, each of several examples with together at most `max_seq_length` inputs
(best-fit decreasing; Krell et al. 2021, "Efficient Sequence Packing", section 4). The rows are the same in
every epoch.

Every epoch takes each example once, in its own order. Nothing is dropped: the last batch may be smaller, and
the last update of an epoch may have fewer micro-batches.
Differs from reference/batching.py: packing finds the best fit by a sorted list; `window_rows` goes on from an
update to the next, so that rows are made once and an epoch's order once an epoch; `updates_an_epoch` is a
function, because `--epochs` needs it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import count

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


def window_rows(lengths: Sequence[int], config: TrainConfig, first_step: int) -> Iterator[list[list[Row]]]:
    """The rows of each micro-batch, update by update from `first_step` on, counted from 0. It never ends."""
    rows, size = rows_of(lengths, config), config.grad_accumulation_steps
    epoch, skipped = divmod(first_step, -(-len(rows) // (config.batch_size * size)))
    for number in count(epoch):
        batches = epoch_batches(number, len(rows), lengths, config)
        for first in range(size * skipped if number == epoch else 0, len(batches), size):
            yield [[rows[i] for i in batch] for batch in batches[first : first + size]]


def epoch_batches(epoch: int, num_rows: int, lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
    """The numbers of the rows in each batch of an epoch."""
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
