"""Batching: what the ladder does not ask of it, because another trainer may choose otherwise."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from mlx_impl.batching import epoch_batches, pack_rows, updates_an_epoch, window_rows
from mlx_impl.config import TrainConfig

LENGTHS = np.random.default_rng(3).integers(1, 40, 61).tolist()


def config(batching: str, **more: Any) -> TrainConfig:
    return TrainConfig(**{"iters": 1, "batch_size": 3, "max_seq_length": 50, **more}, batching=batching)


def numbers_of(steps: range, training: TrainConfig) -> list[list[int]]:
    windows = islice(window_rows(LENGTHS, training, steps.start), len(steps))
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
    """From whatever update a run begins."""
    training, made = config(batching), []

    def counted(epoch: int, *given: Any) -> list[list[int]]:
        made.append(epoch)
        return epoch_batches(epoch, *given)

    monkeypatch.setattr("mlx_impl.batching.epoch_batches", counted)
    steps = updates_an_epoch(LENGTHS, training)
    whole = numbers_of(range(3 * steps), training)
    assert made == [0, 1, 2]
    assert numbers_of(range(steps + 1, 3 * steps), training) == whole[steps + 1 :]
    assert made == [0, 1, 2, 1, 2]
