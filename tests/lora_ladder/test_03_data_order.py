"""Rung 3, data: every epoch is a random order of its own, which the data seed decides and nothing else."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.lora_ladder.chance import FALSE_ALARM
from tests.lora_ladder.epochs import EPOCHS, each_batching, seed_all, settings, whole_epochs
from tests.lora_ladder.examples import (
    Order,
    make_examples,
    num_inputs,
    numbers_in,
    random_lengths,
    trained_on,
)
from tests.lora_ladder.judge import Judge

MANY = 14  # P(at least k of the neighbours in one order are neighbours in a random one) <= 2 / k!


needs_batches = pytest.mark.needs("micro_batches")


@needs_batches
@each_batching
def test_every_epoch_and_every_seed_has_an_order_of_its_own(judge: Judge, batching: str) -> None:
    """Three epochs of the seeds 0, 1 and 2; two of them also differ where seed + epoch is the same number.

    An epoch orders 15 rows or batches at least, and two of 9 random orders are alike in 36 / 15! = 3e-11.
    """
    examples = make_examples(random_lengths(43))
    orders = {}
    for seed in range(3):
        training = replace(settings(batching, 43, steps=3), data_seed=seed)
        for epoch, order in enumerate(whole_epochs(judge, examples, training)[:EPOCHS], 1):
            orders[f"epoch {epoch} of data_seed {seed}"] = numbers_in(order)
    alike = [
        f"{one} and {other}"
        for one, other in itertools.combinations(orders, 2)
        if orders[one] == orders[other]
    ]
    judge.claim(not alike, f"the same order of the examples in {'; '.join(alike)}")


@needs_batches
@each_batching
def test_the_data_seed_alone_decides_the_order(candidate: Any, judge: Judge, batching: str) -> None:
    """Not another setting, not the tokens, not what drew random numbers before."""
    lengths = random_lengths(23)
    examples, training = make_examples(lengths), replace(settings(batching, 23, 2, 2), data_seed=5)
    expected = trained_on(candidate, examples, training)
    others = {
        "a longer run": (examples, replace(training, iters=training.iters + 4)),
        "another seed": (examples, replace(training, seed=3)),
        "another optimizer": (examples, replace(training, optimizer="sgd", learning_rate=0.1)),
        "a schedule": (examples, replace(training, lr_schedule="cosine", warmup_steps=2, max_grad_norm=1.0)),
        "other tokens": (make_examples(lengths, seed=62), training),
    }
    for name, (given, changed) in others.items():
        seed_all(len(name))
        ours = trained_on(candidate, given, changed)[: training.iters]
        judge.claim(ours == expected, f"{name} changes the order")


@needs_batches
def test_no_order_reminds_of_the_file_or_of_another_epoch(judge: Judge) -> None:
    """Plain batches: neighbours in the file are no neighbours in an epoch, nor are those of the last epoch.

    For k pairs of neighbours to stay together n! / (n - k)! / k! choices have (n - k)! orders each, in either
    direction: at least k do so with probability 2 / k!, here 2e-11.
    """
    examples = make_examples(random_lengths(100))
    orders = {"the file": list(range(100))}
    for number, epoch in enumerate(whole_epochs(judge, examples, settings("plain", 100, steps=5)), 1):
        orders[f"epoch {number}"] = numbers_in(epoch)
    for (one, before), (other, after) in itertools.combinations(orders.items(), 2):
        pairs = [set(map(frozenset, itertools.pairwise(order))) for order in (before, after)]
        both = len(pairs[0] & pairs[1])
        message = f"{both} of 99 neighbours in {one} are neighbours in {other}, by chance at most {MANY - 1}"
        judge.claim(both < MANY, message)


@needs_batches
@each_batching
def test_what_is_trained_in_the_first_half_of_an_epoch_is_chance(judge: Judge, batching: str) -> None:
    """Neither the first ones of the file come early, nor the short ones.

    Rows come in random order, or grouped batches. Of N drawn without replacement the number above the median
    is within sqrt(N ln(2 / p) / 2) of its mean (Hoeffding 1963, section 6).
    """
    examples = make_examples(random_lengths(100))
    epochs = whole_epochs(judge, examples, settings(batching, 100, steps=5))[:EPOCHS]
    values = {"place in the file": list(range(100)), "length": list(map(num_inputs, examples))}
    for name, value_of in values.items():
        early, expected, drawn = 0, 0.0, 0
        for epoch in epochs:
            value = np.array([max(value_of[n] for n in unit) for unit in units_of(epoch, batching)])
            is_high, half = value > np.median(value), len(value) // 2
            early, expected = early + int(is_high[:half].sum()), expected + half * is_high.mean()
            drawn += half
        bound = math.sqrt(drawn * math.log(2 / FALSE_ALARM) / 2)
        message = (
            f"{early} of {drawn} in the first halves of the epochs are above the median by {name}, expected "
            f"{expected:.1f} within {bound:.1f} (Hoeffding's bound, false alarm {FALSE_ALARM:g})"
        )
        is_chance = abs(early - expected) <= bound
        judge.claim(is_chance, message)


def units_of(epoch: Order, batching: str) -> list[list[int]]:
    """The examples of each row, or of each batch, in the order of training."""
    batches = [batch for window in epoch for batch in window]
    units = batches if batching == "grouped" else [[row] for batch in batches for row in batch]
    return [[number for row in unit for number in row] for unit in units]
