"""What no target sees is not computed, and nothing that is computed changes for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import (
    SLOTS,
    SMALLEST,
    TARGETS,
    Batch,
    Example,
    kept_slots,
    make_batch,
    make_packed_batch,
    shape_size,
    target_positions,
    training_windows,
)
from mlx_impl.lora import add_lora
from mlx_impl.model import Block, CausalLM, Decoder
from mlx_impl.padding import Kept
from mlx_impl.train import batch_loss, to_arrays
from tests.derived import Divergence, require, within_exact
from tests.ladder.cases import SPEC, random_array
from tests.ladder.protocol import Arrays
from tests.trainers.every_slot import every_slot
from tests.trainers.exact_ops import in_place_of_production

pytestmark = pytest.mark.usefixtures("on_the_cpu")

B, T, H, K = 4, 24, 3, 5


def example(length: int, num_targets: int, num_after: int = 0) -> Example:
    """A prompt, targets, and what comes after the last."""
    tokens = random_array(f"tokens{length}", (length + 1,), 1.0).view(np.uint32) % (SPEC.vocab_size - 1) + 1
    is_target = [False] * (length + 1 - num_targets - num_after) + [True] * num_targets + [False] * num_after
    return Example(tuple(int(token) for token in tokens), tuple(is_target))


UNEQUAL = [example(23, 4), example(5, 2), example(9, 9), example(14, 3, num_after=6)]
WITHOUT_TARGET = [*UNEQUAL[:3], example(20, 0)]
BATCHES = {"unequal lengths": make_batch(UNEQUAL), "a row without a target": make_batch(WITHOUT_TARGET)}


@pytest.mark.parametrize("name", BATCHES)
def test_kept_is_what_a_target_sees_and_one_slot_more_for_all_else(name: str) -> None:
    mask_BT = BATCHES[name].mask_BT
    is_seen_BT = np.array([[row[t:].any() for t in range(len(row))] for row in mask_BT])
    slot_S, place_BT = kept_slots(mask_BT) or pytest.fail("nothing was left out")
    is_kept = np.isin(np.arange(mask_BT.size), slot_S).reshape(mask_BT.shape)
    assert is_kept[is_seen_BT].all()
    assert (slot_S[place_BT[is_kept]] == np.flatnonzero(is_kept)).all()
    stands_in = np.unique(place_BT[~is_kept])
    assert len(stands_in) == 1
    assert not is_seen_BT.flat[slot_S[stands_in[0]]]


def test_of_rows_alike_nothing_is_left_out() -> None:
    assert kept_slots(np.ones((B, T), bool)) is None


@pytest.mark.parametrize("an_octave", [4, 8])
def test_sizes_are_few_and_waste_little(an_octave: int) -> None:
    counts = np.arange(1, 8193)
    sizes = np.array([shape_size(int(n), an_octave) for n in counts])
    assert (sizes >= counts).all()
    assert (sizes - counts < np.maximum(SMALLEST, counts / an_octave)).all()
    assert len(np.unique(sizes[counts > 1024])) == 3 * an_octave


def model_of(**changes: Any) -> CausalLM:
    """In float64, B not zero."""
    mx.random.seed(3)
    model = CausalLM(replace(SPEC, **changes))
    add_lora(model, LoRAConfig(rank=3, alpha=6.0))
    factors = {name: random_array(name, array.shape, 0.1)
               for name, array in tree_flatten(model.trainable_parameters())}  # fmt: skip
    model.load_weights([(name, mx.array(value)) for name, value in factors.items()], strict=False)
    model.set_dtype(mx.float64)
    return model.train()


def results(model: CausalLM, batch: Batch, compiled: bool = False) -> Arrays:
    run = nn.value_and_grad(model, lambda arrays: batch_loss(model, arrays))
    if compiled:
        state = [model.state, mx.random.state]
        run = mx.compile(run, inputs=state, outputs=state)
    with in_place_of_production():
        (nats, _), gradients = run(to_arrays(batch))
    return {"nats": np.array(nats), **{name: np.array(value) for name, value in tree_flatten(gradients)}}


def hold_to_every_slot(model: CausalLM, batch: Batch, compiled: bool = False) -> None:
    ours = results(model, batch, compiled)
    with patch.object(Decoder, "at_targets", every_slot):
        whole = results(model, batch)
    require("without padding", [within_exact(name, ours[name], whole[name]) for name in whole])


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_are_those_of_every_slot(name: str) -> None:
    hold_to_every_slot(model_of(), BATCHES[name])


def test_compiled_too() -> None:
    hold_to_every_slot(model_of(), BATCHES["unequal lengths"], compiled=True)


def test_checkpointed_too() -> None:
    model = model_of()
    model.model.grad_checkpoint = True
    hold_to_every_slot(model, BATCHES["unequal lengths"])


def test_with_a_sliding_window_too() -> None:
    hold_to_every_slot(model_of(sliding_window=6), BATCHES["unequal lengths"])


def test_with_packed_rows_too() -> None:
    packed = make_packed_batch(UNEQUAL, [(0,), (1, 2), (3,)])
    assert kept_slots(packed.mask_BT)
    hold_to_every_slot(model_of(), packed)


def test_a_stand_in_that_a_target_sees_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The red twin: what is left out hands its gradient to a token that counts."""

    def careless(mask_BT: np.ndarray) -> Any:
        slot_S, place_BT = kept_slots(mask_BT) or pytest.fail("nothing was left out")
        is_kept = np.isin(np.arange(mask_BT.size), slot_S).reshape(mask_BT.shape)
        return slot_S, np.where(is_kept, place_BT, 0)

    monkeypatch.setattr("mlx_impl.train.kept_slots", careless)
    with pytest.raises(Divergence):
        hold_to_every_slot(model_of(), BATCHES["unequal lengths"])


def test_the_blocks_see_the_kept_slots_and_the_last_feed_forward_the_targets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes, not seconds: of 51 inputs 45 are seen, since 6 come after a row's last target; 18 targets."""
    model, batch = model_of(), BATCHES["unequal lengths"]
    seen: list[Any] = []
    monkeypatch.setattr(Block, "__call__", noting(Block.__call__, seen))
    results(model, batch)
    kept = (1, shape_size(45 + 1, SLOTS))
    *inner, last = seen
    assert (batch.num_tokens, batch.mask_BT.sum(), batch.mask_BT.size) == (51, 18, 96)
    assert inner == [(kept, kept)] * len(inner)
    assert last == (kept, (1, shape_size(18, TARGETS)))


def noting(call: Any, seen: list) -> Any:
    def noted(self: Any, x_BTD: mx.array, *more: Any) -> mx.array:
        y_BTD: mx.array = call(self, x_BTD, *more)
        seen.append((x_BTD.shape[:2], y_BTD.shape[:2]))
        return y_BTD

    return noted


def test_spread_and_gather_are_moves_and_each_others_gradient() -> None:
    mask_BT = BATCHES["unequal lengths"].mask_BT
    slot_S, place_BT = kept_slots(mask_BT) or pytest.fail("nothing was left out")
    kept, S = Kept(mx.array(slot_S), mx.array(place_BT)), len(slot_S)
    x_1SO = mx.array(random_array("x", (1, S, H * K), 1.0))
    d_BHTK = mx.array(random_array("d", (B, H, T, K), 1.0))
    (rows_BHTK,), (d_1SO,) = mx.vjp(lambda x: kept.spread(x, H), [x_1SO], [d_BHTK])
    by_token = np.array(x_1SO).reshape(S, H, K)[place_BT].swapaxes(1, 2)
    assert (np.array(rows_BHTK) == by_token).all()
    expected_1SO = np.array(d_BHTK).swapaxes(1, 2).reshape(B * T, H * K)[slot_S][None]
    assert (np.array(d_1SO) == expected_1SO).all()
    (back_1SO,), (again_BHTK,) = mx.vjp(kept.gather, [rows_BHTK], [x_1SO])
    assert mx.array_equal(back_1SO, x_1SO)
    assert mx.array_equal(again_BHTK, rows_BHTK)


def batches_of(batching: str) -> list[Batch]:
    """A thousand, of rows from 8 to 1,024 tokens, a tenth to six tenths of them targets."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(5.3, 0.7, 4000)).astype(int), 8, 1024)
    targets = np.maximum(1, random.uniform(0.1, 0.6, 4000) * lengths).astype(int)
    examples = [example(int(n), int(t)) for n, t in zip(lengths, targets, strict=True)]
    config = TrainConfig(iters=1000, batch_size=4, batching=batching, max_seq_length=1024)
    return [batch for window in training_windows(examples, config) for batch in window]


def shape_of(batch: Batch) -> tuple[int, ...]:
    """All that a compiled step's trace depends on."""
    kept = kept_slots(batch.mask_BT)
    return (*batch.inputs_BT.shape, len(kept[0]) if kept else 0, len(target_positions(batch)[0]))


@pytest.mark.parametrize(("batching", "at_most"), [("plain", 500), ("grouped", 300), ("packed", 10)])
def test_a_thousand_batches_have_few_shapes(batching: str, at_most: int) -> None:
    """Counted once, 411, 258 and 7: a bound against growth, not a derivation."""
    assert len({shape_of(batch) for batch in batches_of(batching)}) <= at_most


def test_less_than_a_twentieth_of_what_is_computed_is_padding() -> None:
    """Whatever the order of the rows; 45% of the slots of these batches are padding."""
    batches = batches_of("plain")
    kept = [kept_slots(batch.mask_BT) for batch in batches]
    computed = sum(len(k[0]) if k else b.mask_BT.size for k, b in zip(kept, batches, strict=True))
    assert sum(batch.num_tokens for batch in batches) > 0.95 * computed
    assert sum(batch.num_tokens for batch in batches) < 0.6 * sum(batch.mask_BT.size for batch in batches)
