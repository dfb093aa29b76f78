"""Rung 10, equivalences: optimizations for speed or memory change no result.

Gradient accumulation equals one large batch, a compiled update equals an eager one, and gradient
checkpointing equals stored activations. Dropout acts on the input of A, and only in training; here its masks
are given, and rung 14 judges those that a trainer draws. MLX:
`mx.compile` must be given all state that an update reads or writes (model, optimizer, `mx.random.state`);
anything else is silently frozen into the graph as a constant.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.derived import FACTOR, UNIT_ROUNDOFF, judged
from tests.lora_ladder.cases import Case, rows_of
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays

ADAMW = TrainConfig(iters=3, learning_rate=0.01, weight_decay=0.1)
SGD = TrainConfig(iters=3, learning_rate=0.05, optimizer="sgd")
WIDE, NARROW = 2.0**-7, 2.0**-8  # values of h for central differences
ACCUMULATED = replace(SGD, grad_accumulation_steps=2)
ZERO_RATE = TrainConfig(iters=3, learning_rate=0.0)


def each_of(*ways: str) -> pytest.MarkDecorator:
    """One test for each of these methods, which all train; a method that is absent is not claimed."""
    return pytest.mark.parametrize(
        "how", [pytest.param(how, marks=[pytest.mark.needs(how)] * (how != "train")) for how in ways]
    )


each_optimizer = pytest.mark.parametrize(
    "training", [SGD, ADAMW], ids=["sgd", "adamw"]
)  # the simpler one first


def trained(trainer: Any, windows: list[list[Batch]], training: TrainConfig, how: str = "train") -> Arrays:
    losses = getattr(trainer, how)(windows, training)
    return {"losses": np.array(losses), **trainer.factors()}


def micro_batches(case: Case) -> tuple[list[list[Batch]], list[list[Batch]]]:
    """Three updates over rows of 9, 3 and 2 targets: split into micro-batches, and each as one whole batch.

    The last update has one micro-batch, the others have two.
    """
    one, two, three = ([row] for row in range(3))
    split = [[one, two], [three, one], [two]]
    whole = [[[0, 1]], [[2, 0]], [[1]]]

    def windows(rows: list[list[list[int]]]) -> list[list[Batch]]:
        return [[rows_of(case.batch, chosen) for chosen in update] for update in rows]

    return windows(split), windows(whole)


@each_optimizer
def test_updates_with_gradient_accumulation_equal_the_reference(
    case: Case, judge: Judge, training: TrainConfig
) -> None:
    """The micro-batches have unequal target counts, and the last update has fewer micro-batches."""
    split, _ = micro_batches(case)
    accumulating = replace(training, grad_accumulation_steps=2)
    judge(case, lambda t: trained(t, split, accumulating), training.iters * case.longest_sum)


def test_the_schedule_counts_updates_and_not_micro_batches(case: Case, judge: Judge) -> None:
    """A learning rate that falls with every update, where an update has two micro-batches."""
    split, _ = micro_batches(case)
    falling = replace(SGD, grad_accumulation_steps=2, lr_schedule="linear")
    judge(case, lambda t: trained(t, split, falling), SGD.iters * case.longest_sum)


@pytest.mark.canonical("accumulation")
@each_optimizer
def test_micro_batches_are_one_batch(case: Case, judge: Judge, training: TrainConfig) -> None:
    """Gradients and target counts are summed over the micro-batches and divided once."""
    split, whole = micro_batches(case)
    accumulating = replace(training, grad_accumulation_steps=2)
    judge.alike(
        (case, lambda trainer: trained(trainer, split, accumulating)),
        (case, lambda trainer: trained(trainer, whole, training)),
        training.iters * case.longest_sum,
    )


def test_the_accumulated_gradient_is_clipped_and_not_each_micro_batch(case: Case, judge: Judge) -> None:
    """Once per update, by the norm of the whole gradient."""
    split, _ = micro_batches(case)
    clipped = replace(SGD, grad_accumulation_steps=2, max_grad_norm=2.0**-4)
    judge(case, lambda trainer: trained(trainer, split, clipped), SGD.iters * case.longest_sum)


def each_way(how: str) -> Any:
    """Train by the method `how`, or by `train` where it is absent, as in the reference."""

    def act(trainer: Any, windows: list[list[Batch]], training: TrainConfig) -> Arrays:
        return trained(trainer, windows, training, how if hasattr(trainer, how) else "train")

    return act


def windows_of_two_shapes(case: Case) -> list[list[Batch]]:
    """Three updates with two micro-batches each: one of one row and one of two rows, in either order."""
    one, two = rows_of(case.batch, [0]), rows_of(case.batch, [1, 2])
    return [[one, two], [two, one], [one, two]]


COMPILED = [
    pytest.param("untied", ADAMW, id="adamw"),
    pytest.param("untied", replace(ACCUMULATED, max_grad_norm=2.0**-4), id="accumulated sgd"),
    pytest.param("dora", replace(SGD, grad_checkpoint=True), id="recomputed dora with dropout"),
]


@pytest.mark.needs("train_compiled")
@pytest.mark.parametrize(("case", "training"), COMPILED, indirect=["case"])
def test_compiled_updates_equal_eager_ones(case: Case, judge: Judge, training: TrainConfig) -> None:
    """Over three updates, so that the second and third depend on the state that the first left.

    Three runs: AdamW alone; accumulation over batches of two shapes with clipping; and DoRA with
    checkpointing and dropout, where the same seed must give the same dropout masks. That one takes SGD: where
    a gradient happens to be almost zero, AdamW turns its rounding noise into a whole step, and the reference
    cannot say where, because the trainer draws the masks.
    """
    act = each_way("train_compiled")
    tried = case.with_dropout(0.25) if training.grad_checkpoint else case
    is_split = training.grad_accumulation_steps > 1
    windows = windows_of_two_shapes(case) if is_split else [[case.batch]] * training.iters
    judge.alike(
        (tried, lambda trainer: act(trainer, windows, training)),
        (tried, lambda trainer: trained(trainer, windows, training)),
        training.iters * case.longest_sum,
    )


@pytest.mark.needs("train_checkpointed")
@pytest.mark.parametrize("case", ["untied", "dora"], indirect=True)
def test_recomputed_activations_change_nothing(case: Case, judge: Judge) -> None:
    """The backward pass recomputes exactly what the forward pass computed."""
    act = each_way("train_checkpointed")
    windows = [[case.batch]] * 3
    judge.alike(
        (case, lambda trainer: act(trainer, windows, ADAMW)),
        (case, lambda trainer: trained(trainer, windows, ADAMW)),
        ADAMW.iters * case.longest_sum,
    )


def random_masks(case: Case) -> Arrays:
    """A keep mask for the input of every adapted linear; a quarter of the elements are dropped."""
    rng = np.random.default_rng(29)
    names = [name.removesuffix(".lora_a") for name in case.factors if name.endswith("lora_a")]
    return {
        name: rng.random((*case.batch.inputs_BT.shape, case.factors[f"{name}.lora_a"].shape[0])) >= 0.25
        for name in names
    }


def masked(trainer: Any, case: Case, how: str = "train") -> Arrays:
    trainer.set_dropout_masks(random_masks(case))
    return each_way(how)(trainer, [[case.batch]] * 2, replace(SGD, iters=2))


@pytest.mark.needs("set_dropout_masks")
@pytest.mark.parametrize("case", ["untied", "dora"], indirect=True)
def test_dropout_with_given_masks_equals_the_reference(case: Case, judge: Judge) -> None:
    """Dropout acts on the input of A only, and divides the kept elements by 1 - p."""
    dropping = case.with_dropout(0.25)
    judge(dropping, lambda trainer: masked(trainer, case), 2 * case.longest_sum)


@pytest.mark.needs("set_dropout_masks", "train_checkpointed")
def test_recomputed_activations_use_the_same_dropout_masks(case: Case, judge: Judge) -> None:
    """The masks are given, so that only the recomputation differs."""
    dropping = case.with_dropout(0.25)
    judge.alike(
        (dropping, lambda trainer: masked(trainer, case, "train_checkpointed")),
        (dropping, lambda trainer: masked(trainer, case)),
        2 * case.longest_sum,
    )


def loss_at(case: Case, candidate: Any, how: str, factors: Arrays) -> float:
    """The training loss at these factors, under the dropout masks that the run's seed gives."""
    trainer = replace(case, factors={**case.factors, **factors}).build(candidate)
    return float(getattr(trainer, how)([[case.batch]], replace(ZERO_RATE, iters=1))[0])


@each_of("train", "train_checkpointed")
def test_the_backward_pass_uses_the_dropout_masks_of_the_forward_pass(
    case: Case, candidate: Any, judge: Judge, how: str
) -> None:
    """The gradient's norm equals the slope of the loss along the gradient, under the same seed.

    The gradient is read off an SGD update at learning rate 1. The slope is the Richardson limit of two
    central differences. Its error is the rounding of the losses, divided by the difference between the two
    points, plus the truncation, which is at most the distance between the two differences.
    """
    dropping = case.with_dropout(0.25)
    trainer = dropping.build(candidate)
    (loss_nats,) = getattr(trainer, how)([[case.batch]], replace(SGD, iters=1, learning_rate=1.0))
    gradient = {name: case.factors[name] - moved for name, moved in trainer.factors().items()}
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values())))

    def slope(h: float) -> float:
        sides = []
        for by in (h / norm, -h / norm):
            moved = {name: case.factors[name] + by * g for name, g in gradient.items()}
            sides.append(loss_at(dropping, candidate, how, moved))
        return (sides[0] - sides[1]) / (2 * h)

    wide, narrow = slope(WIDE), slope(NARROW)
    rounding = np.sqrt(case.longest_sum) * UNIT_ROUNDOFF * loss_nats * (4 / NARROW + 1 / WIDE) / 3
    tolerance = FACTOR * rounding + abs(wide - narrow)
    derivation = (
        f"{FACTOR:g} x rounding of the quotients {rounding:.3g} + truncation {abs(wide - narrow):.3g}"
    )
    limit = np.array((4 * narrow - wide) / 3)
    judge.hold([judged("slope along the gradient", np.array(norm), limit, tolerance, derivation)])


def test_dropout_is_off_in_evaluation(case: Case, candidate: Any, judge: Judge) -> None:
    """Logits and loss equal those without dropout, to the bit, before and after an update."""
    without, dropping = case.build(candidate), case.with_dropout(0.5).build(candidate)
    for _ in range(2):
        expected, ours = (
            {"logits": trainer.logits(case.batch.inputs_BT), "nats": trainer.loss(case.batch)[0]}
            for trainer in (without, dropping)
        )
        judge.same_computation(ours, expected, case.longest_sum)
        dropping.train([[case.batch]], ZERO_RATE)


@pytest.mark.needs("evaluate")
def test_dropout_is_off_in_validation(case: Case, candidate: Any, judge: Judge) -> None:
    """Both for a new model and after an update."""
    without, dropping = case.build(candidate), case.with_dropout(0.5).build(candidate)
    for _ in range(2):
        ours, expected = ({"nats": trainer.evaluate([case.batch])} for trainer in (dropping, without))
        judge.same_computation(ours, expected, case.longest_sum)
        dropping.train([[case.batch]], ZERO_RATE)
