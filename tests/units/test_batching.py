"""Batching: what the ladder does not ask of it, because another trainer may choose otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_impl.batching import epoch_batches, pack_rows, rows_of, window_rows
from mlx_impl.config import TrainConfig

LENGTHS = np.random.default_rng(3).integers(1, 40, 61).tolist()


def config(batching: str, **more: Any) -> TrainConfig:
    return TrainConfig(**{"iters": 1, "batch_size": 3, "max_seq_length": 50, **more}, batching=batching)


def numbers_of(steps: range, training: TrainConfig) -> list[list[int]]:
    rows = rows_of(LENGTHS, training)
    windows = [window_rows(step, rows, LENGTHS, training) for step in steps]
    return [[n for batch in window for row in batch for n in row] for window in windows]


def test_plain_batches_are_slices_of_the_epochs_permutation() -> None:
    """As they always were: a run of before can be gone on with."""
    order = np.random.default_rng([0, 1]).permutation(len(LENGTHS)).tolist()
    training = config("plain", grad_accumulation_steps=2)
    assert numbers_of(range(11, 22), training) == [order[i : i + 6] for i in range(0, len(LENGTHS), 6)]


def test_packed_rows_hold_at_most_the_maximum_and_few_are_needed() -> None:
    rows = pack_rows(LENGTHS, 50, seed=0)
    sums = [sum(LENGTHS[n] for n in row) for row in rows]
    assert max(sums) <= 50
    assert len(rows) <= 1.22 * -(-sum(LENGTHS) // 50) + 1  # best-fit decreasing: 11/9 of the optimum, + 1
    assert pack_rows([60, 3], 50, seed=0) == [(0,), (1,)]  # one too long is alone


@pytest.mark.parametrize("batching", ["plain", "grouped", "packed"])
def test_an_epochs_order_is_made_once_and_not_for_every_update(
    monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    """The updates of two lists of examples, asked for in turn, are still each list's own."""
    training = config(batching)
    rows, others = rows_of(LENGTHS, training), rows_of(LENGTHS[::-1], training)
    made: list[int] = []

    def counted(epoch: int, *given: Any) -> list[list[int]]:
        made.append(epoch)
        return epoch_batches(epoch, *given)

    monkeypatch.setattr("mlx_impl.batching.epoch_batches", counted)
    num_steps = 2 * -(-len(rows) // 3)
    once = [window_rows(step, rows, LENGTHS, training) for step in range(num_steps)]
    assert made == [0, 1]
    in_turn = []
    for step in range(num_steps):
        window_rows(step, others, LENGTHS[::-1], training)
        in_turn.append(window_rows(step, rows, LENGTHS, training))
    assert in_turn == once
