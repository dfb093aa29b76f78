"""Rung 9, equivalences: what is done for speed or memory changes no result.

Micro-batches are one batch, compiled is eager, recomputed is remembered; dropout acts on A's input, in
training alone. MLX: `mx.compile` must be told of every state that a step reads and writes, model, optimizer
and `mx.random.state`; what it is not told of is frozen into the graph, and the run goes on in silence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.derived import FACTOR, UNIT_ROUNDOFF, judged
from tests.ladder.cases import Case, rows_of
from tests.ladder.judge import Judge
from tests.ladder.protocol import Arrays

ADAMW = TrainConfig(iters=3, learning_rate=0.01, weight_decay=0.1)
SGD = TrainConfig(iters=3, learning_rate=0.05, optimizer="sgd")
WIDE, NARROW = 2.0**-7, 2.0**-8  # steps of central differences
ACCUMULATED = replace(SGD, grad_accumulation_steps=2)
STILL = TrainConfig(iters=3, learning_rate=0.0)


def each_of(*ways: str) -> pytest.MarkDecorator:
    """The ways to train, those that are claimed."""
    return pytest.mark.parametrize(
        "how", [pytest.param(how, marks=[pytest.mark.needs(how)] * (how != "train")) for how in ways]
    )


each_optimizer = pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])  # simple ones first


def trained(trainer: Any, windows: list[list[Batch]], training: TrainConfig, how: str = "train") -> Arrays:
    losses = getattr(trainer, how)(windows, training)
    return {"losses": np.array(losses), **trainer.factors()}


def micro_batches(case: Case) -> tuple[list[list[Batch]], list[list[Batch]]]:
    """Rows of 9, 3 and 2 targets: windows of two micro-batches, the last of one; and each as one batch."""
    one, two, three = ([row] for row in range(3))
    split = [[one, two], [three, one], [two]]
    whole = [[[0, 1]], [[2, 0]], [[1]]]

    def windows(rows: list[list[list[int]]]) -> list[list[Batch]]:
        return [[rows_of(case.batch, chosen) for chosen in window] for window in rows]

    return windows(split), windows(whole)


@each_optimizer
def test_accumulated_updates_equal_the_reference(case: Case, judge: Judge, training: TrainConfig) -> None:
    """Windows of unequal target counts, and a last window that is not full."""
    split, _ = micro_batches(case)
    accumulating = replace(training, grad_accumulation_steps=2)
    judge(case, lambda t: trained(t, split, accumulating), training.iters * case.longest_sum)


def test_the_schedule_counts_updates_and_not_micro_batches(case: Case, judge: Judge) -> None:
    """A learning rate that falls in every update, over windows of two micro-batches."""
    split, _ = micro_batches(case)
    falling = replace(SGD, grad_accumulation_steps=2, lr_schedule="linear")
    judge(case, lambda t: trained(t, split, falling), SGD.iters * case.longest_sum)


@pytest.mark.canonical("accumulation")
@each_optimizer
def test_micro_batches_are_one_batch(case: Case, judge: Judge, training: TrainConfig) -> None:
    """Gradients and target counts are summed, and divided once."""
    split, whole = micro_batches(case)
    accumulating = replace(training, grad_accumulation_steps=2)
    judge.alike(
        (case, lambda trainer: trained(trainer, split, accumulating)),
        (case, lambda trainer: trained(trainer, whole, training)),
        training.iters * case.longest_sum,
    )


def test_the_sum_of_a_window_is_clipped_and_not_its_parts(case: Case, judge: Judge) -> None:
    """Once for each update, by the norm of the whole."""
    split, _ = micro_batches(case)
    clipped = replace(SGD, grad_accumulation_steps=2, max_grad_norm=2.0**-4)
    judge(case, lambda trainer: trained(trainer, split, clipped), SGD.iters * case.longest_sum)


def each_way(how: str) -> Any:
    """Compiled or recomputed, by the reference simply trained."""

    def act(trainer: Any, windows: list[list[Batch]], training: TrainConfig) -> Arrays:
        return trained(trainer, windows, training, how if hasattr(trainer, how) else "train")

    return act


def windows_of_two_shapes(case: Case) -> list[list[Batch]]:
    """Of two micro-batches each, of one row and of two, in either order."""
    one, two = rows_of(case.batch, [0]), rows_of(case.batch, [1, 2])
    return [[one, two], [two, one], [one, two]]


COMPILED = [
    pytest.param("untied", ADAMW, id="adamw"),
    pytest.param("untied", replace(ACCUMULATED, max_grad_norm=2.0**-4), id="accumulated sgd"),
    pytest.param("dora", replace(ADAMW, grad_checkpoint=True), id="recomputed dora with dropout"),
]


@pytest.mark.needs("train_compiled")
@pytest.mark.parametrize(("case", "training"), COMPILED, indirect=["case"])
def test_compiled_updates_equal_eager_ones(case: Case, judge: Judge, training: TrainConfig) -> None:
    """Three updates: the second and third go on from what the first has left.

    Plain; in windows of two shapes, clipped; and with all that could part the two ways, where the same seed
    must give the same dropout masks.
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
    """What the backward pass computes again is what the forward pass had computed."""
    act = each_way("train_checkpointed")
    windows = [[case.batch]] * 3
    judge.alike(
        (case, lambda trainer: act(trainer, windows, ADAMW)),
        (case, lambda trainer: trained(trainer, windows, ADAMW)),
        ADAMW.iters * case.longest_sum,
    )


def random_masks(case: Case) -> Arrays:
    """For each adapted linear which elements of its input are kept, a quarter of them not."""
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
    """It falls on A's input only, and what is kept is divided by 1 - p."""
    dropping = case.with_dropout(0.25)
    judge(dropping, lambda trainer: masked(trainer, case), 2 * case.longest_sum)


@pytest.mark.needs("set_dropout_masks", "train_checkpointed")
def test_recomputed_activations_meet_the_same_dropout_mask(case: Case, judge: Judge) -> None:
    """With the masks given, so that nothing but the recomputation differs."""
    dropping = case.with_dropout(0.25)
    judge.alike(
        (dropping, lambda trainer: masked(trainer, case, "train_checkpointed")),
        (dropping, lambda trainer: masked(trainer, case)),
        2 * case.longest_sum,
    )


def loss_at(case: Case, candidate: Any, how: str, factors: Arrays) -> float:
    """Under the masks that the seed of the run gives."""
    trainer = replace(case, factors={**case.factors, **factors}).build(candidate)
    return float(getattr(trainer, how)([[case.batch]], replace(STILL, iters=1))[0])


@each_of("train", "train_checkpointed")
def test_the_backward_pass_meets_the_masks_of_the_forward_pass(
    case: Case, candidate: Any, judge: Judge, how: str
) -> None:
    """An update of SGD by 1 is the gradient; along itself its slope is that of the loss under the same seed.

    The slope is Richardson's limit of two central differences. What rounds is the loss, divided by the steps;
    the limit is nearer to the truth than the two are to one another.
    """
    dropping = case.with_dropout(0.25)
    trainer = dropping.build(candidate)
    (loss_nats,) = getattr(trainer, how)([[case.batch]], replace(SGD, iters=1, learning_rate=1.0))
    gradient = {name: case.factors[name] - moved for name, moved in trainer.factors().items()}
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values())))

    def slope(h: float) -> float:
        sides = []
        for step in (h / norm, -h / norm):
            moved = {name: case.factors[name] + step * g for name, g in gradient.items()}
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
    """Logits and loss are those without dropout, to the bit, before an update and after it."""
    plain, dropping = case.build(candidate), case.with_dropout(0.5).build(candidate)
    for _ in range(2):
        expected, ours = (
            {"logits": trainer.logits(case.batch.inputs_BT), "nats": trainer.loss(case.batch)[0]}
            for trainer in (plain, dropping)
        )
        judge.same_bits(ours, expected)
        dropping.train([[case.batch]], STILL)


@pytest.mark.needs("evaluate")
def test_dropout_is_off_over_a_data_set(case: Case, candidate: Any, judge: Judge) -> None:
    """In validation too, straight from a model newly made and after an update."""
    plain, dropping = case.build(candidate), case.with_dropout(0.5).build(candidate)
    for _ in range(2):
        ours, expected = ({"nats": trainer.evaluate([case.batch])} for trainer in (dropping, plain))
        judge.same_bits(ours, expected)
        dropping.train([[case.batch]], STILL)


def test_dropout_keeps_the_expectation(case: Case, candidate: Any) -> None:
    """On the mean of 32 masks of the trainer's own, an adapter acts as it does without dropout.

    B is a short step along its gradient, so that the loss is nearly linear in what is dropped. Half of the
    input is, so not to divide by 1 - p would halve the effect: 5 standard errors must be less than that.
    """
    zero, num_masks = case.with_zero_b(), 32
    gradients = zero.build(candidate).gradients(case.batch)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients.values()))
    factors = {n: v - np.float32(2.0**-8 / norm) * gradients[n] for n, v in zero.factors.items()}
    moved = replace(case, factors=factors)
    without, plain = (c.build(candidate).train([[case.batch]], STILL)[0] for c in (zero, moved))
    dropping = moved.with_dropout(0.5).build(candidate)
    dropped = np.array(dropping.train([[case.batch]] * num_masks, replace(STILL, iters=num_masks)))
    effects = (dropped - without) / (plain - without)
    error = effects.std(ddof=1) / np.sqrt(num_masks)
    print(f"{effects.mean():.3f} of the effect, standard error {error:.3f}")
    assert abs(effects.mean() - 1) <= 5 * error < 0.5


def test_a_larger_share_dropped_scatters_more(case: Case, candidate: Any) -> None:
    """As sqrt(p / (1 - p)) to first order: nine times at 0.9 what it is at 0.1; who keeps p, a ninth."""
    few, many = (
        np.std(case.with_dropout(p).build(candidate).train([[case.batch]] * 16, replace(STILL, iters=16)))
        for p in (0.1, 0.9)
    )
    assert few < many


@each_of("train", "train_compiled")
def test_every_update_draws_a_new_dropout_mask(case: Case, candidate: Any, how: str) -> None:
    """At learning rate 0 only it differs; a compiler not told of the random state would repeat it."""
    trainer = case.with_dropout(0.5).build(candidate)
    losses = getattr(trainer, how)([[case.batch]] * 3, STILL)
    assert len(set(losses)) == 3


def test_every_micro_batch_draws_a_new_dropout_mask(case: Case, candidate: Any) -> None:
    """A window of the same batch twice has not the loss of that batch once."""
    trainers = [case.with_dropout(0.5).build(candidate) for _ in range(2)]
    once = trainers[0].train([[case.batch]], replace(STILL, iters=1))
    twice = trainers[1].train([[case.batch] * 2], replace(STILL, iters=1, grad_accumulation_steps=2))
    assert once != twice
