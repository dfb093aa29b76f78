"""Rung 14: dropout masks that are shared, repeated or wrongly seeded; initial factors with another law."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.lora import LoRALinear, add_lora, lora_layers
from mlx_impl.recompute import next_key, random_state
from mlx_impl.train import seed_random, train
from tests.trainers.mutants.equivalences import dropped_by
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches, training

init_linear = LoRALinear.__init__
Shape = tuple[int, ...]


def kept(self: Any, shape: Shape) -> mx.array:
    return mx.random.bernoulli(1 - self.p, shape, next_key())


def in_shape(of: Callable[[Shape], Shape]) -> Patches:
    """The mask is drawn in another shape, and broadcast to that of x."""
    return dropped_by(lambda self, x: x * kept(self, of(x.shape)) / (1 - self.p))


def from_one_key(self: Any, x: mx.array) -> mx.array:
    return x * mx.random.bernoulli(1 - self.p, x.shape, random_state()) / (1 - self.p)


def once_for_an_input() -> Patches:
    last: list[mx.array] = []

    def broken(self: Any, x: mx.array) -> mx.array:
        if not last or last[0] is not x:
            last[:] = [x, kept(self, x.shape)]
        return x * last[1] / (1 - self.p)

    return dropped_by(broken)


def by_place_in_the_layer() -> Patches:
    calls: list[int] = []

    def broken(self: Any, x: mx.array) -> mx.array:
        keys = mx.random.split(random_state(), 7)
        calls.append(0)
        return x * mx.random.bernoulli(1 - self.p, x.shape, keys[len(calls) % 7]) / (1 - self.p)

    return dropped_by(broken)


def often_as_the_token_before(self: Any, x: mx.array) -> mx.array:
    """At every second token, a quarter of the elements have the mask of the token before."""
    own, is_copied = kept(self, x.shape), mx.random.bernoulli(0.25, x.shape)
    is_second = (mx.arange(x.shape[-2]) % 2 == 1)[:, None]
    before = mx.concatenate([own[..., :1, :], own[..., :-1, :]], axis=-2)
    return x * mx.where(is_copied & is_second, before, own) / (1 - self.p)


def last_feature_kept(self: Any, x: mx.array) -> mx.array:
    keep = kept(self, x.shape) | (mx.arange(x.shape[-1]) == x.shape[-1] - 1)
    return x * keep / (1 - self.p)


def seeded(numbers: Callable[[int, int, int], tuple[int, int, int]]) -> Patches:
    """Other numbers than (seed, update, micro-batch) decide the masks."""
    return {"mlx_impl.train.seed_random": lambda *given: seed_random(*numbers(*given))}


def seeded_by_the_rate(model: Any, optimizer: Any, windows: Any, config: Any, **more: Any) -> Iterator[Any]:
    by = int(config.learning_rate * 2**30)
    with patch("mlx_impl.train.seed_random", lambda seed, *rest: seed_random(seed + by, *rest)):
        yield from train(model, optimizer, windows, config, **more)


def seeded_by_the_length(model: Any, optimizer: Any, windows: Any, config: Any, **more: Any) -> Iterator[Any]:
    with patch("mlx_impl.train.seed_random", lambda seed, *rest: seed_random(seed + config.iters, *rest)):
        yield from train(model, optimizer, windows, config, **more)


def with_more_dropout_where_narrow(
    self: Any, linear: nn.Linear, rank: int, scale: float, dropout: float
) -> None:
    init_linear(self, linear, rank, scale, dropout * (1.5 if linear.weight.shape[0] == 20 else 1.0))


def initial(change: Callable[[str, Any], None]) -> Patches:
    """Other factors than `add_lora` makes."""

    def broken(model: Any, config: Any) -> None:
        add_lora(model, config)
        for name, linear in lora_layers(model).items():
            change(name, linear)

    return {"mlx_impl.run.trainer.add_lora": broken}


def with_a(values: Callable[[int, int, int], mx.array]) -> Patches:
    """A by its numbers of inputs, ranks and outputs."""

    def change(name: str, linear: Any) -> None:
        (num_in, rank), num_out = linear.lora_a.shape, linear.lora_b.shape[1]
        linear.lora_a = values(num_in, rank, num_out)

    return initial(change)


def uniform(bound: float, shape: Shape) -> mx.array:
    return mx.random.uniform(-bound, bound, shape)


def hash_of(name: str) -> int:
    return zlib.crc32(name.encode())


def with_a_of(key: Callable[[str], int]) -> Patches:
    """A of a key that several linears share."""

    def change(name: str, linear: Any) -> None:
        num_in, rank = linear.lora_a.shape
        own = mx.random.key(key(name))
        linear.lora_a = mx.random.uniform(-(num_in**-0.5), num_in**-0.5, (num_in, rank), key=own)

    return initial(change)


def with_b(name: str, linear: Any) -> None:
    linear.lora_b = uniform(linear.lora_b.shape[0] ** -0.5, linear.lora_b.shape)


def with_magnitude_one(name: str, linear: Any) -> None:
    if "magnitude" in linear:
        linear.magnitude = mx.ones_like(linear.magnitude)


def after(seed: Callable[[], int]) -> Patches:
    def broken(model: Any, config: Any) -> None:
        mx.random.seed(seed())
        add_lora(model, config)

    return {"mlx_impl.run.trainer.add_lora": broken}


MUTANTS = [
    Mutant(
        "mask-shared-by-tokens",
        14,
        "A dropout mask is drawn for one token and used for all.",
        in_shape(lambda shape: (*shape[:-2], 1, shape[-1])),
    ),
    Mutant(
        "mask-shared-by-rows",
        14,
        "A dropout mask is drawn for one row and used for all.",
        in_shape(lambda shape: (1, *shape[1:])),
        trainer=PLAIN,
    ),
    Mutant(
        "mask-of-whole-tokens",
        14,
        "Dropout drops whole tokens: all features of one together.",
        in_shape(lambda shape: (*shape[:-1], 1)),
    ),
    Mutant(
        "mask-of-pairs-of-features",
        14,
        "A dropout mask is drawn for every second feature and used for two.",
        dropped_by(
            lambda self, x: (
                x
                * mx.repeat(kept(self, (*x.shape[:-1], (x.shape[-1] + 1) // 2)), 2, -1)[..., : x.shape[-1]]
                / (1 - self.p)
            )
        ),
    ),
    Mutant(
        "mask-shared-by-linears",
        14,
        "Every linear draws its dropout mask from the same key of the random state.",
        dropped_by(from_one_key),
    ),
    Mutant(
        "mask-shared-by-linears-of-one-input",
        14,
        "Linears of one input share a dropout mask, where each has its own in PEFT.",
        once_for_an_input(),
    ),
    Mutant(
        "mask-shared-by-layers",
        14,
        "The key of a dropout mask depends on the linear's place in its layer, and not on the layer.",
        by_place_in_the_layer(),
    ),
    Mutant(
        "mask-as-the-token-before",
        10,
        "Some elements of a mask are copies of the token before: a correlation of an eighth.",
        dropped_by(often_as_the_token_before),
    ),
    Mutant(
        "last-feature-never-dropped",
        14,
        "The last feature of an input is never dropped, as by a mask that is one element short.",
        dropped_by(last_feature_kept),
    ),
    Mutant(
        "mask-shared-by-updates",
        14,
        "The update's number is no part of the seed, so every update drops the same elements.",
        seeded(lambda seed, step, micro_batch: (seed, 0, micro_batch)),
    ),
    Mutant(
        "mask-shared-by-micro-batches",
        14,
        "The micro-batches of an update drop the same elements.",
        seeded(lambda seed, step, micro_batch: (seed, step, 0)),
    ),
    Mutant(
        "mask-repeats-every-other-update",
        14,
        "Every second update drops the same elements.",
        seeded(lambda seed, step, micro_batch: (seed, step % 2, micro_batch)),
    ),
    Mutant(
        "mask-of-the-next-micro-batch",
        14,
        "Update and micro-batch are added in the seed, so the next update begins with masks of this one.",
        seeded(lambda seed, step, micro_batch: (seed, step + micro_batch, 0)),
    ),
    Mutant(
        "dropout-ignores-the-seed",
        14,
        "Dropout masks do not depend on the run's seed.",
        seeded(lambda seed, step, micro_batch: (0, step, micro_batch)),
    ),
    Mutant(
        "seed-plus-update",
        14,
        "Seed and update are added, so seed 1 begins with the masks of seed 0's second update.",
        seeded(lambda seed, step, micro_batch: (0, seed + step, micro_batch)),
    ),
    Mutant(
        "seed-plus-twice-the-update",
        14,
        "The seed is added to the number of micro-batches seen, so runs share masks.",
        seeded(lambda seed, step, micro_batch: (0, seed + 2 * step + micro_batch, 0)),
    ),
    Mutant(
        "mask-depends-on-the-rate",
        10,
        "The learning rate is part of the seed of the dropout masks.",
        training(seeded_by_the_rate),
    ),
    Mutant(
        "mask-depends-on-the-length",
        14,
        "The number of updates of the run is part of the seed of the dropout masks.",
        training(seeded_by_the_length),
    ),
    Mutant(
        "dropout-of-another-linear",
        10,
        "The key and value projections are built with another linear's dropout.",
        {"mlx_impl.lora.LoRALinear.__init__": with_more_dropout_where_narrow},
    ),
    Mutant(
        "dropout-scaled-twice",
        14,
        "What dropout keeps is divided by 1 - p twice.",
        dropped_by(lambda self, x: x * kept(self, x.shape) / (1 - self.p) ** 2),
    ),
    Mutant(
        "dropout-scaled-by-1-plus-p",
        14,
        "What dropout keeps is multiplied by 1 + p instead of divided by 1 - p.",
        dropped_by(lambda self, x: x * kept(self, x.shape) * (1 + self.p)),
    ),
    Mutant(
        "a-normal",
        14,
        "A begins normal, with the standard deviation of PEFT's uniform law.",
        with_a(lambda num_in, rank, _: mx.random.normal((num_in, rank)) * (3 * num_in) ** -0.5),
    ),
    Mutant(
        "a-bounded-by-the-rank",
        14,
        "A begins uniform within 1 / sqrt(R) instead of 1 / sqrt(I).",
        with_a(lambda num_in, rank, _: uniform(rank**-0.5, (num_in, rank))),
    ),
    Mutant(
        "a-bounded-by-1-over-i",
        14,
        "A begins uniform within 1 / I: the root is missing.",
        with_a(lambda num_in, rank, _: uniform(1 / num_in, (num_in, rank))),
    ),
    Mutant(
        "a-bounded-by-the-outputs",
        14,
        "A begins uniform within 1 / sqrt(O), as if A were stored transposed.",
        with_a(lambda num_in, rank, num_out: uniform(num_out**-0.5, (num_in, rank))),
    ),
    Mutant(
        "a-positive",
        14,
        "A begins uniform between 0 and the bound.",
        with_a(lambda num_in, rank, _: mx.abs(uniform(num_in**-0.5, (num_in, rank)))),
    ),
    Mutant(
        "a-columns-alike",
        14,
        "The second half of A's columns repeats the first, so half the rank is lost.",
        with_a(lambda num_in, rank, _: mx.tile(uniform(num_in**-0.5, (num_in, rank // 2)), (1, 2))),
    ),
    Mutant(
        "a-shared-by-layers",
        14,
        "Each layer's A begins from the same key.",
        with_a_of(lambda name: hash_of(name.rpartition(".")[2])),
    ),
    Mutant(
        "a-shared-by-queries-keys-and-values",
        14,
        "The projections of queries, keys and values begin with the same A.",
        with_a_of(lambda name: hash_of(name.translate({ord(letter): "q" for letter in "qkv"}))),
    ),
    Mutant(
        "b-not-zero",
        14,
        "B begins uniform, so an adapter changes the model before it is trained.",
        initial(with_b),
    ),
    Mutant(
        "magnitude-one",
        14,
        "DoRA's magnitudes begin at one instead of the lengths of the weight's rows.",
        initial(with_magnitude_one),
    ),
    Mutant(
        "initial-factors-ignore-the-seed",
        14,
        "The initial factors do not depend on the seed.",
        after(lambda: 0),
    ),
    Mutant(
        "initial-factors-unseeded",
        14,
        "The initial factors are drawn before the seed is set, so no run can be repeated.",
        after(lambda: int.from_bytes(os.urandom(4))),
    ),
]
