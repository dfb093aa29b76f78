"""What no target sees is not computed, and nothing that is computed changes for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig
from mlx_impl.data import SMALLEST, Batch, Example, kept_slots, make_batch, make_packed_batch, shape_size
from mlx_impl.lora import add_lora
from mlx_impl.model import Block, CausalLM
from mlx_impl.padding import Kept
from mlx_impl.train import batch_loss, to_arrays
from tests.derived import Divergence, require, within_exact
from tests.ladder.cases import SPEC, random_array
from tests.ladder.protocol import Arrays
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


def test_sizes_are_few_and_waste_little() -> None:
    sizes = np.array([shape_size(n) for n in range(1, 8193)])
    counts = np.arange(1, 8193)
    assert (sizes >= counts).all()
    assert (sizes - counts < np.maximum(SMALLEST, counts / 16 + 1)).all()
    assert len(np.unique(sizes)) <= 16 * 8  # 16 an octave


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
    model.model.leaves_out = False
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
    """Sizes, not seconds: 51 inputs of 96 slots, 18 targets."""
    model, batch = model_of(), BATCHES["unequal lengths"]
    seen: list[Any] = []
    monkeypatch.setattr(Block, "__call__", noting(Block.__call__, seen))
    results(model, batch)
    num_seen, num_targets = int(batch.num_tokens) - 6, int(batch.mask_BT.sum())
    *inner, last = seen
    assert inner == [((1, shape_size(num_seen + 1)),) * 2] * len(inner)
    assert last == ((1, shape_size(num_seen + 1)), (1, shape_size(num_targets)))


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


def test_padding_is_under_a_sixteenth_of_what_is_computed() -> None:
    """But for small batches, and whatever the lengths."""
    random = np.random.default_rng(5)
    for _ in range(50):
        lengths = random.integers(1, 400, 8)
        batch = make_batch([example(int(n), 1) for n in lengths])
        kept = kept_slots(batch.mask_BT)
        computed = len(kept[0]) if kept else batch.mask_BT.size
        assert (computed - batch.num_tokens) / computed < 1 / 16 + SMALLEST / computed
