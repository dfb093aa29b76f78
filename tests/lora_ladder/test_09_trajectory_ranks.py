"""Rung 9, several ranks: processes that share out an update's micro-batches train the run of one.

The usual mistakes: means of means, the same rows on every rank, a norm that is clipped before the sum, and
random numbers or initial factors of a rank's own. Windows of three, of one and of two micro-batches with 9,
3 and 2 targets leave a rank without work, so that every weighting but that by targets differs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.cases import Case, rows_of
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays

pytestmark = pytest.mark.needs("train_on_ranks")

TRAINING = TrainConfig(
    iters=3,
    batch_size=1,
    grad_accumulation_steps=3,
    optimizer="sgd",
    learning_rate=0.05,
    max_grad_norm=2.0**-4,  # below every update's norm
)
RANKS = 2


def windows_of(case: Case) -> list[list[Batch]]:
    return [[rows_of(case.batch, [row]) for row in rows] for rows in ([0, 1, 2], [2], [1, 0])]


def together(trainer: Any, case: Case, training: TrainConfig) -> Arrays:
    """What every rank reports and holds; for the reference, and where one process trains, one rank's."""
    windows = windows_of(case)
    if hasattr(trainer, "train_on_ranks"):
        of_ranks = trainer.train_on_ranks(windows, training, RANKS)
    else:
        of_ranks = [(trainer.train(windows, training), trainer.factors())] * RANKS
    return by_rank({n: {"losses": np.array(losses), **arrays} for n, (losses, arrays) in enumerate(of_ranks)})


def alone(trainer: Any, case: Case, training: TrainConfig) -> Arrays:
    windows = windows_of(case)
    of_one = {"losses": np.array(trainer.train(windows, training)), **trainer.factors()}
    return by_rank(dict.fromkeys(range(RANKS), of_one))


def by_rank(arrays: dict[int, Arrays]) -> Arrays:
    return {f"rank {rank}: {name}": array for rank, own in arrays.items() for name, array in own.items()}


def test_all_ranks_train_as_the_reference_does_alone(case: Case, judge: Judge) -> None:
    """Losses and factors of both ranks, over updates in which one of them has no micro-batch."""
    judge(case, lambda trainer: together(trainer, case, TRAINING), TRAINING.iters * case.longest_sum)


@pytest.mark.parametrize("case", ["dora"], indirect=True)
def test_ranks_with_dropout_train_as_one_process_does(case: Case, judge: Judge) -> None:
    """Dropout masks follow from seed, update and micro-batch, and not from the rank.

    By SGD: where a gradient happens to be almost zero, AdamW turns its rounding noise into a whole step, and
    the reference cannot say where, because the trainer draws the masks.
    """
    dropping, training = case.with_dropout(0.25), replace(TRAINING, loraplus_lr_ratio=4.0)
    judge.alike(
        (dropping, lambda trainer: together(trainer, case, training)),
        (dropping, lambda trainer: alone(trainer, case, training)),
        training.iters * case.longest_sum,
    )


@pytest.mark.needs("initial_factors_on_ranks", "initial_factors")
def test_all_ranks_begin_with_the_factors_of_one_process(case: Case, candidate: Any, judge: Judge) -> None:
    """Where each draws an A of its own, the summed gradient is that of none of the ranks' adapters."""
    trainer = case.build(candidate)
    of_ranks = dict(enumerate(trainer.initial_factors_on_ranks(0, RANKS)))
    of_one = dict.fromkeys(of_ranks, trainer.initial_factors(0))
    judge.same_bits(by_rank(of_ranks), by_rank(of_one))
