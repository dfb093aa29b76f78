"""Which examples share a row, a batch and an update, by the plainest code that says so.

Source of packing: Krell et al. 2021, "Efficient Sequence Packing", section 4 (best-fit decreasing).
Differs from mlx_impl/batching.py: packing looks through all rows for the best fit, and anew for every update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_impl.config import TrainConfig

Row = tuple[int, ...]  # numbers of the examples in a row of a batch, from 0
POOL = 50  # batches within which "grouped" sorts by length


def rows_of(lengths: Sequence[int], config: TrainConfig) -> list[Row]:
    """The rows of an epoch; `lengths` are the examples' numbers of inputs."""
    if config.batching != "packed":
        return [(number,) for number in range(len(lengths))]
    order = np.random.default_rng(config.data_seed).permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(order, key=lambda number: -lengths[number]):
        fits = [row for row in range(len(rows)) if room[row] >= lengths[number]]
        if not fits:
            fits = [len(rows)]
            rows.append([])
            room.append(max(config.max_seq_length, lengths[number]))
        row = min(fits, key=lambda row: room[row])
        rows[row].append(number)
        room[row] -= lengths[number]
    return [tuple(row) for row in rows]


def window_rows(step: int, lengths: Sequence[int], config: TrainConfig) -> list[list[Row]]:
    """The rows of each micro-batch of update `step`, counted from 0."""
    rows, size = rows_of(lengths, config), config.batch_size
    updates_an_epoch = -(-len(rows) // (size * config.grad_accumulation_steps))
    epoch, index = step // updates_an_epoch, step % updates_an_epoch
    random = np.random.default_rng([config.data_seed, epoch])
    order = random.permutation(len(rows)).tolist()
    if config.batching == "grouped":
        pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
        order = [row for pool in pools for row in sorted(pool, key=lambda row: lengths[row])]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if config.batching == "grouped":
        batches = [batches[i] for i in random.permutation(len(batches))]
    first = index * config.grad_accumulation_steps
    return [[rows[i] for i in batch] for batch in batches[first : first + config.grad_accumulation_steps]]
