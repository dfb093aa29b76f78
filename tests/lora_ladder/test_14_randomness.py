"""Rung 14, randomness: the dropout masks and the initial factors that a trainer draws for itself.

The rungs below are given masks and factors. Here the masks are read off what one update of SGD does to A
(`masks.py`), each element of each linear's input, and the claims about them are exact where they can be and
else state their probability of a false alarm (`chance.py`). MLX: `mx.compile` must be told of
`mx.random.state`, or it draws one mask for ever.

How much dependence is seen: some 24,000 elements of masks can be read, so that Hoeffding's bound on a
correlation is 0.06 between neighbouring features, 0.07 between tokens, linears or updates, and 0.09 between
rows, layers or micro-batches. Where a quarter of the elements of every second token are copies of the token
before, the correlation is 0.12, and is caught; with a tenth of them it is 0.05, and would pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_impl.config import BLOCK_LINEARS, LoRAConfig, TrainConfig
from tests.derived import judged
from tests.lora_ladder.cases import SPEC, Case, make_factors, make_weights
from tests.lora_ladder.chance import (
    FALSE_ALARM,
    require_independent,
    require_means,
    require_uniform,
    require_unrelated,
)
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.masks import AXES, READING, TRAINING, masks_drawn
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.test_02_layer import require_mapping
from tests.lora_ladder.test_02_layer_names import adapted, each_adapter

OTHER_SETTINGS = replace(TRAINING, learning_rate=2 * TRAINING.learning_rate, iters=2 * TRAINING.iters)


def test_every_update_and_micro_batch_draws_a_new_mask(case: Case, candidate: Any) -> None:
    """Judged by the losses at rate 0, so for every optimizer; nothing but the masks differs between them."""
    training = TrainConfig(iters=3, learning_rate=0.0)
    losses = case.with_dropout(0.5).build(candidate).train([[case.batch]] * 3, training)
    halves = replace(training, grad_accumulation_steps=2)
    (of_two, *_) = case.with_dropout(0.5).build(candidate).train([[case.batch] * 2] * 3, halves)
    assert len({*losses, of_two}) == 4, (
        f"three updates and one of two micro-batches must have four losses, got {losses} and {of_two}"
    )


def test_so_many_elements_are_dropped(candidate: Any, judge: Judge) -> None:
    """A quarter of them at dropout 0.25: in each row, token, feature, linear and so on, and in every two."""
    masks = masks_drawn(candidate, 0.25)
    judge.report(lambda: require_means("kept", masks.keep, masks.is_read, 0.75, AXES))


def test_a_rate_of_one_in_512_drops_some(candidate: Any, judge: Judge) -> None:
    """A rate that is rounded to 256ths, or to a hundredth, drops none, or far too many.

    At least one of n: none has probability (1 - p)^n. At most n p + sqrt(2 n p L) + L / 3 with L = ln(1 / P),
    Bernstein's bound (Boucheron et al. 2013, "Concentration Inequalities", theorem 2.10).
    """
    p = 1 / 512
    masks = masks_drawn(candidate, p)
    num_read, num_dropped = masks.is_read.sum(), (masks.is_read & ~masks.keep).sum()
    assert (1 - p) ** num_read < FALSE_ALARM, "too few elements to tell"
    log = np.log(1 / FALSE_ALARM)
    most = num_read * p + np.sqrt(2 * num_read * p * log) + log / 3
    message = f"{num_dropped} of {num_read} dropped, expected at least 1 and at most {most:.0f}"
    judge.claim(1 <= num_dropped <= most, message)


def test_what_is_kept_is_divided_by_1_minus_p(candidate: Any, judge: Judge) -> None:
    """x / 0.6 at dropout 0.4, where 1 / (1 - p), 1 / p and 1 + p are far apart; what is dropped is 0."""
    masks = masks_drawn(candidate, 0.4)
    ratio, expected = masks.ratio[masks.is_read], np.where(masks.keep, 1 / 0.6, 0.0)[masks.is_read]
    worst = int(np.argmax(np.abs(ratio - expected)))
    derivation = f"{READING:g}, the largest error of reading it through a float32 gradient"
    judge.hold([judged("dropped input / input", ratio[worst], expected[worst], READING, derivation)])


def test_no_element_of_a_mask_says_anything_about_another(candidate: Any, judge: Judge) -> None:
    """Over rows, tokens, features, linears, layers, micro-batches and updates, and any of them together."""
    signs = masks_drawn(candidate, 0.5).signs
    judge.report(lambda: require_independent("dropout masks", signs, AXES))


def test_another_seed_draws_unrelated_masks(candidate: Any, judge: Judge) -> None:
    """Seeds 0, 1 and 4: also not the masks of another update, as from seed + update or seed + 2 * update."""
    signs = {
        seed: masks_drawn(candidate, 0.5, training=replace(TRAINING, seed=seed)).signs for seed in (0, 1, 4)
    }
    for one, other in ((0, 1), (0, 4), (1, 4)):
        what = f"dropout masks of seeds {one} and {other}"
        judge.report(lambda: require_unrelated(what, signs[one], signs[other], AXES))  # noqa: B023


@pytest.mark.parametrize(
    ("how", "training"),
    [
        pytest.param("train", TRAINING, id="again"),
        pytest.param("train", OTHER_SETTINGS, id="other settings"),
        pytest.param("train_compiled", TRAINING, marks=pytest.mark.needs("train_compiled"), id="compiled"),
        pytest.param(
            "train_checkpointed", TRAINING, marks=pytest.mark.needs("train_checkpointed"), id="checkpointed"
        ),
    ],
)
def test_the_seed_decides_the_masks_whatever_the_way(
    candidate: Any, judge: Judge, how: str, training: TrainConfig
) -> None:
    """The same masks to the bit: again, compiled, recomputed, at another learning rate, in a longer run."""
    once = masks_drawn(candidate, 0.5)
    masks_drawn(candidate, 0.25, training=replace(TRAINING, iters=1, seed=77))  # draws other numbers
    again = masks_drawn(candidate, 0.5, how, training)
    is_read = once.is_read & again.is_read
    judge.same_bits({"masks": again.signs * is_read}, {"masks": once.signs * is_read})


def made(candidate: Any, lora: LoRAConfig, seed: int) -> tuple[Case, Arrays]:
    """The factors that a trainer makes for itself, in a trainer that was given others."""
    weights = make_weights(SPEC)
    case = Case("made", SPEC, lora, weights, make_factors(SPEC, lora, weights))
    return case, case.build(candidate).initial_factors(seed)


LAW = LoRAConfig(rank=16, alpha=20.0)
each_kind = pytest.mark.parametrize(
    "lora", [LAW, replace(LAW, use_dora=True, use_rslora=True)], ids=["lora", "rslora and dora"]
)
of_its_own = pytest.mark.needs("initial_factors")


@of_its_own
@each_kind
def test_an_adapter_begins_as_the_base_model(candidate: Any, judge: Judge, lora: LoRAConfig) -> None:
    """B is zero, and DoRA's magnitude the length of the weight's row (Hu et al. 2021, section 4.1)."""
    case, factors = made(candidate, lora, seed=0)
    judge.require_names(factors, case.factors)
    b_names = [name for name in factors if name.endswith("lora_b")]
    judge.same_bits({n: factors[n] for n in b_names}, {n: np.zeros_like(case.factors[n]) for n in b_names})
    lengths = {
        name: np.linalg.norm(case.weights[name.replace("magnitude", "weight")].astype(np.float64), axis=1)
        for name in factors
        if name.endswith("magnitude")
    }
    if lengths:
        judge.hold([judge.rounded(n, factors[n], lengths[n], SPEC.intermediate_size) for n in lengths])


@of_its_own
@each_adapter
def test_each_linear_begins_with_the_rank_of_its_name(candidate: Any, judge: Judge, name: str) -> None:
    """Of twelve layers, where a pattern for layer 1 is not one for layer 11."""
    case = adapted(name)
    require_mapping("initial factors", case.build(candidate).initial_factors(0), case.factors)


def a_over_bound(factors: Arrays) -> np.ndarray:
    """Every A sqrt(I): (layer, linear, feature, rank), NaN beyond a linear's own features."""
    sizes = {name: value.shape for name, value in factors.items() if name.endswith("lora_a")}
    num_in = max(size[0] for size in sizes.values())
    values = np.full((SPEC.num_hidden_layers, len(BLOCK_LINEARS), num_in, LAW.rank), np.nan)
    for name, (num_features, _) in sizes.items():
        layer, linear = int(name.split(".")[2]), BLOCK_LINEARS.index(name.split(".")[-2])
        values[layer, linear, :num_features] = factors[name] * np.sqrt(num_features)
    return values


@of_its_own
@each_kind
def test_a_begins_uniform_within_1_over_sqrt_i(candidate: Any, judge: Judge, lora: LoRAConfig) -> None:
    """PEFT's law, `kaiming_uniform_(a=sqrt(5))`: U(-1 / sqrt(I), 1 / sqrt(I))."""
    values = a_over_bound(made(candidate, lora, seed=0)[1])
    values = values[~np.isnan(values)] * (1 - 2.0**-22)  # a bound that was rounded up
    judge.report(lambda: require_uniform("A sqrt(I)", values))


@of_its_own
def test_no_element_of_a_says_anything_about_another(candidate: Any, judge: Judge) -> None:
    """Over layers, linears, features and ranks; and seeds 0 and 1 are unrelated."""
    axes = ("layer", "linear", "feature", "rank")
    ours, others = (np.nan_to_num(np.sign(a_over_bound(made(candidate, LAW, seed)[1]))) for seed in (0, 1))
    judge.report(lambda: require_independent("initial A", ours, axes))
    judge.report(lambda: require_unrelated("initial A of seeds 0 and 1", ours, others, axes))


@of_its_own
def test_the_seed_decides_the_initial_factors(candidate: Any, judge: Judge) -> None:
    """Again, to the bit, after other factors were made."""
    _, once = made(candidate, LAW, seed=3)
    made(candidate, LAW, seed=4)
    judge.same_bits(made(candidate, LAW, seed=3)[1], once)


@of_its_own
@pytest.mark.parametrize(
    "other",
    [replace(LAW, alpha=5.0), replace(LAW, use_rslora=True), replace(LAW, dropout=0.25)],
    ids=["alpha", "rslora", "dropout"],
)
def test_the_initial_a_does_not_depend_on_what_is_not_drawn(
    candidate: Any, judge: Judge, other: LoRAConfig
) -> None:
    """With another scale or dropout every linear begins with the same A, to the bit: all draw in one order.

    An order that follows from hashes, as that of a set, follows from the scales too, and differs between two
    processes: of the 14! orders of these linears another one comes out with certainty, as good as.
    """
    once, again = (made(candidate, lora, seed=3)[1] for lora in (LAW, other))
    judge.same_bits(again, once)
