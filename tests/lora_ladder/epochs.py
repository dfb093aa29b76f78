"""Runs of a few epochs, for the claims about data."""

from __future__ import annotations

import math
import random
import sys
from operator import attrgetter

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from tests.lora_ladder.examples import BATCHINGS, Order, epochs_of, trained_on
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Examples

EPOCHS = 3
CAPACITY = 28  # inputs of a packed row; the longest random example has 24
SEEDS = {"mlx.core": "random.seed", "torch": "manual_seed"}  # of the frameworks' global random states

each_batching = pytest.mark.parametrize("batching", BATCHINGS)


def settings(batching: str, num_examples: int, size: int = 2, steps: int = 1) -> TrainConfig:
    """Three epochs; more of them where packing needs fewer rows than there are examples."""
    return TrainConfig(
        iters=EPOCHS * math.ceil(num_examples / (size * steps)),
        batch_size=size,
        grad_accumulation_steps=steps,
        batching=batching,
        max_seq_length=CAPACITY,
    )


def whole_epochs(judge: Judge, examples: Examples, training: TrainConfig) -> list[Order]:
    return judge.report(lambda: epochs_of(trained_on(judge.candidate, examples, training), len(examples)))


def seed_all(seed: int) -> None:
    """Every global random state, also that of the framework that the trainer has loaded."""
    random.seed(seed)
    np.random.seed(seed)
    for framework, name in SEEDS.items():
        if framework in sys.modules:
            attrgetter(name)(sys.modules[framework])(seed)
