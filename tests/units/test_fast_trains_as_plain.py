"""A run of the fast path is the run of the plain one: its losses, its factors, and the states it saves.

The bounds are those of test_fast_equals_plain.py, over three updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Window
from tests.derived import require_same_bits
from tests.lora_ladder.cases import Case, named_case
from tests.lora_ladder.protocol import Arrays
from tests.properties.run_of_acts import float64_in_safetensors
from tests.trainers.mlx_impl import MlxTrainer, PlainTrainer
from tests.units.test_fast_equals_plain import (
    BATCHES,
    Trainer,
    build,
    require_exact,
    require_within_rounding,
)

RATE = 2.0**-6  # which float32 holds, as MLX keeps it
ADAMW = TrainConfig(iters=3, learning_rate=RATE, weight_decay=0.125)
SGD = replace(ADAMW, optimizer="sgd")
TRAININGS = {
    "adamw": ADAMW,
    "adamw, clipped, LoRA+": replace(ADAMW, max_grad_norm=0.25, loraplus_lr_ratio=4.0),
    "sgd": SGD,
    "sgd, clipped, LoRA+, checkpointed": replace(
        SGD, max_grad_norm=0.25, loraplus_lr_ratio=4.0, grad_checkpoint=True
    ),
}
every_training = pytest.mark.parametrize("training", TRAININGS)
MIXED = ("unequal lengths", "a shared prefix", "packed rows", "a row without a target")


def windows_of(case: Case, num_batches: int) -> list[Window]:
    """Three updates, each of so many micro-batches of every kind in turn."""
    batches = [BATCHES[MIXED[number % len(MIXED)]](case) for number in range(3 * num_batches)]
    return [batches[first : first + num_batches] for first in range(0, len(batches), num_batches)]


def run(kind: Trainer, case: Case, training: TrainConfig, num_batches: int) -> Arrays:
    built = build(kind, case)
    losses = built.train(windows_of(case, num_batches), training)
    norms = [record.grad_norm for record in built.records]
    return {"losses": np.array(losses), "norms": np.array(norms), **built.factors()}


@pytest.mark.parametrize(("name", "num_batches"), [("untied", 1), ("dora", 2), ("untied", 3)])
@every_training
def test_in_float64_three_updates_are_equal_to_1e_12(name: str, training: str, num_batches: int) -> None:
    """One, two and three micro-batches an update."""
    act = partial(run, training=TRAININGS[training], num_batches=num_batches)
    require_exact(named_case(name), act)


@pytest.mark.parametrize("training", ["adamw, clipped, LoRA+", "sgd, clipped, LoRA+, checkpointed"])
def test_in_float32_three_updates_are_equal_within_rounding(training: str) -> None:
    require_within_rounding(named_case("untied"), partial(run, training=TRAININGS[training], num_batches=2))


def stopped_and_resumed(kinds: Sequence[Trainer], case: Case, training: TrainConfig, folder: Path) -> Arrays:
    """An update by each of them, which saves; the next one, with other factors, resumes."""
    losses: list[float] = []
    for number, (kind, window) in enumerate(zip(kinds, windows_of(case, 2), strict=True)):
        built = build(kind, case.with_zero_b() if number else case)
        if number:
            built.load(folder)
        losses += built.train([window], training)
        built.save(folder)
    return {"losses": np.array(losses), **built.factors()}


FAST, PLAIN = MlxTrainer, PlainTrainer
RESUMED = [
    ("untied", "adamw, clipped, LoRA+"),
    ("dora", "adamw"),
    ("patterns", "sgd"),
    ("last layer", "sgd, clipped, LoRA+, checkpointed"),
]


@pytest.mark.parametrize("kinds", [(PLAIN, FAST, PLAIN), (FAST, PLAIN, FAST)], ids=["plain", "fast"])
@pytest.mark.parametrize(("name", "training"), RESUMED)
def test_each_path_resumes_what_the_other_saved(
    name: str, training: str, kinds: tuple[Trainer, ...], tmp_path: Path
) -> None:
    """In float64, to 1e-12 of the plain run that was never stopped."""

    def act(kind: Trainer, case: Case) -> Arrays:
        if kind is PLAIN:
            whole = run(PLAIN, case, TRAININGS[training], 2)
            return {name: array for name, array in whole.items() if name != "norms"}
        with float64_in_safetensors():
            return stopped_and_resumed(kinds, case, TRAININGS[training], tmp_path)

    require_exact(named_case(name), act)


@pytest.mark.parametrize("kind", [FAST, PLAIN], ids=["fast", "plain"])
@pytest.mark.parametrize(("name", "training"), RESUMED)
def test_each_path_resumes_its_own_state_to_the_bit(
    name: str, training: str, kind: Trainer, tmp_path: Path
) -> None:
    """With random dropout, in float32."""
    case = named_case(name).with_dropout(0.25)
    whole = run(kind, case, TRAININGS[training], 2)
    resumed = stopped_and_resumed([kind] * 3, case, TRAININGS[training], tmp_path)
    require_same_bits("resumed", resumed, {name: whole[name] for name in resumed})
