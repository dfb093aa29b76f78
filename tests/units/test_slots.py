"""What no target sees is not computed, what rows share is computed once, and nothing changes for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_impl.fast.slots import Slots

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import (
    SMALLEST,
    TARGETS,
    Batch,
    Example,
    bucket_size,
    make_batch,
    make_packed_batch,
    target_positions,
    training_windows,
)
from mlx_impl.fast.layout import SLOTS, KeptSlots, kept_slots, shared_columns
from mlx_impl.lora import add_lora
from mlx_impl.model import Block, CausalLM, Decoder
from mlx_impl.train import batch_loss, to_arrays
from tests.derived import Divergence, require, within_exact
from tests.ladder.cases import SPEC, random_array
from tests.ladder.protocol import Arrays
from tests.trainers.every_slot import every_slot
from tests.trainers.exact_ops import in_place_of_production

pytestmark = pytest.mark.usefixtures("on_the_cpu")

B, T, H, K = 4, 24, 3, 5


def example(length: int, num_targets: int, num_after: int = 0, num_shared: int = 0) -> Example:
    """Shared tokens, a prompt, targets, and what comes after the last."""
    own = random_array(f"tokens{length}", (length + 1,), 1.0).view(np.uint32) % (SPEC.vocab_size - 1) + 1
    tokens = np.append(np.arange(1, num_shared + 1), own[num_shared:])
    is_target = [False] * (length + 1 - num_targets - num_after) + [True] * num_targets + [False] * num_after
    return Example(tuple(int(token) for token in tokens), tuple(is_target))


LENGTHS = [(23, 4, 0), (5, 2, 0), (9, 9, 0), (14, 3, 6)]
UNEQUAL = [example(*numbers) for numbers in LENGTHS]
ONE_PROMPT = [example(*numbers, num_shared=9) for numbers in [(23, 4, 0), (11, 2, 0), (9, 9, 0), (20, 3, 6)]]
NO_PADDING = [example(24, 4, num_shared=9), example(23, 14, num_shared=9)]
EVERY_TOKEN = [example(length, length, num_shared=10) for length in (23, 14, 12)]
BATCHES = {
    "unequal lengths": make_batch(UNEQUAL),
    "a row without a target": make_batch([*UNEQUAL[:3], example(20, 0)]),
    "one system prompt": make_batch(ONE_PROMPT),
    "one system prompt, the first row without a target": make_batch([example(20, 0), *ONE_PROMPT]),
    "one system prompt and no padding": make_batch([*NO_PADDING, *NO_PADDING]),
    "rows alike": make_batch([NO_PADDING[0]] * 4),
    "every token a target, and fillers at the first": make_batch(EVERY_TOKEN),
}
NUM_SHARED = dict(zip(BATCHES, (0, 0, 9, 9, 9, 24, 10), strict=True))


def kept_of(batch: Batch) -> KeptSlots:
    return kept_slots(batch) or pytest.fail("nothing was left out")


def histories(batch: Batch) -> np.ndarray:
    """Of each slot a number for its row's tokens up to it, and one less than 0 where no target sees it."""
    numbers: dict[bytes, int] = {}
    rows = zip(batch.inputs_BT, batch.mask_BT, strict=True)
    return np.array([[numbers.setdefault(tokens[: t + 1].tobytes(), len(numbers)) if mask[t:].any() else -1
                      for t in range(len(tokens))] for tokens, mask in rows])  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_every_slot_that_a_target_sees_has_its_own_tokens_value(name: str) -> None:
    batch = BATCHES[name]
    kept, of_slot_BT = kept_of(batch), histories(batch)
    seen_BT = of_slot_BT >= 0
    assert (of_slot_BT.flat[kept.slot_S[kept.place_BT]] == of_slot_BT)[seen_BT].all()
    assert (0 if kept.is_shared_S is None else kept.is_shared_S.sum()) == NUM_SHARED[name]
    assert len(kept.slot_S) == len(np.unique(kept.slot_S)) < batch.mask_BT.size


@pytest.mark.parametrize("name", BATCHES)
def test_a_shared_slot_is_at_home_in_one_row_and_all_else_that_is_left_out_in_a_slot_that_none_sees(
    name: str,
) -> None:
    batch = BATCHES[name]
    kept = kept_of(batch)
    is_home_BT = kept.slot_S[kept.home_BT] == np.arange(batch.mask_BT.size).reshape(batch.mask_BT.shape)
    assert is_home_BT.sum() == len(kept.slot_S)
    (stands_in,) = np.unique(kept.home_BT[~is_home_BT])
    seen = np.unique(kept.place_BT[histories(batch) >= 0])
    assert stands_in not in seen


def test_of_rows_with_nothing_to_leave_out_all_is_computed() -> None:
    assert kept_slots(make_batch([example(24, 24)] + [example(23, 23)] * (B - 1))) is None


@pytest.mark.parametrize(("length", "shared"), [(79, 10), (80, 10), (81, 0)])
def test_what_is_shared_is_a_sixteenth_of_all_or_nothing_is(length: int, shared: int) -> None:
    batch = make_batch([example(length, 2, num_shared=10), example(length - 1, 2, num_shared=10)])
    is_seen_BT = np.arange(batch.mask_BT.shape[1]) < np.array([[length], [length]])
    assert shared_columns(batch, is_seen_BT) == shared


def test_what_stands_for_the_rest_is_a_token_that_counts_where_one_is_left_out() -> None:
    """Not what nobody looks at, which may be no number."""
    kept = kept_of(BATCHES["one system prompt, the first row without a target"])
    filler = kept.slot_S[~kept.is_seen_S][0]
    assert histories(BATCHES["one system prompt, the first row without a target"]).flat[filler] >= 0


def test_a_token_or_an_example_that_differs_ends_what_is_shared() -> None:
    row, is_input_BT = example(19, 2), np.arange(40) < np.array([[38], [38]])
    packed = make_packed_batch([row, row], [(0, 1), (0, 1)])
    assert shared_columns(packed, is_input_BT) == 38
    other_token = packed._replace(inputs_BT=packed.inputs_BT + [[0], [1]] * (np.arange(40) == 30))
    assert shared_columns(other_token, is_input_BT) == 30
    other_example = packed._replace(segment_BT=np.array([[1], [2]]) * packed.segment_BT)
    assert shared_columns(other_example, is_input_BT) == 19


@pytest.mark.parametrize("an_octave", [4, 8])
def test_sizes_are_few_and_waste_little(an_octave: int) -> None:
    counts = np.arange(1, 8193)
    sizes = np.array([bucket_size(int(n), an_octave) for n in counts])
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


SHARED_OR_NOT = pytest.mark.parametrize("name", ["unequal lengths", "one system prompt"])


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_are_those_of_every_slot(name: str) -> None:
    hold_to_every_slot(model_of(), BATCHES[name])


def test_compiled_too() -> None:
    hold_to_every_slot(model_of(), BATCHES["one system prompt"], compiled=True)


@SHARED_OR_NOT
def test_checkpointed_too(name: str) -> None:
    model = model_of()
    model.model.grad_checkpoint = True
    hold_to_every_slot(model, BATCHES[name])


@SHARED_OR_NOT
def test_with_a_sliding_window_too(name: str) -> None:
    hold_to_every_slot(model_of(sliding_window=6), BATCHES[name])


@pytest.mark.parametrize("rows", [UNEQUAL, ONE_PROMPT])
def test_with_packed_rows_too(rows: list[Example]) -> None:
    packed = make_packed_batch(rows, [(0,), (1, 2), (3,)])
    assert kept_slots(packed)
    hold_to_every_slot(model_of(), packed)


def test_a_stand_in_that_a_target_sees_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The red twin: what is left out hands its gradient to a token that counts."""

    def careless(batch: Batch) -> KeptSlots:
        kept = kept_of(batch)
        is_home_BT = kept.slot_S[kept.home_BT] == np.arange(batch.mask_BT.size).reshape(batch.mask_BT.shape)
        return kept._replace(home_BT=np.where(is_home_BT, kept.home_BT, 0))

    monkeypatch.setattr("mlx_impl.train.kept_slots", careless)
    with pytest.raises(Divergence):
        hold_to_every_slot(model_of(), BATCHES["unequal lengths"])


def test_a_gradient_of_the_first_row_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The red twin: what rows share gets the gradient of one of them."""
    monkeypatch.setattr(Slots, "summed", Slots.picked)
    with pytest.raises(Divergence):
        hold_to_every_slot(model_of(), BATCHES["one system prompt"])


@pytest.mark.parametrize(("name", "seen"), [("unequal lengths", 45), ("one system prompt", 57 - 3 * 9)])
def test_the_blocks_see_the_kept_slots_and_the_last_feed_forward_the_targets(
    name: str, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, not seconds: 51 and 63 inputs, of which 6 come after a row's last target; 18 targets."""
    model, batch = model_of(), BATCHES[name]
    sizes: list[Any] = []
    monkeypatch.setattr(Block, "__call__", noting(Block.__call__, sizes))
    results(model, batch)
    kept = (1, bucket_size(seen + 1, SLOTS))
    *inner, last = sizes
    assert (batch.mask_BT.sum(), batch.mask_BT.size) == (18, 96)
    assert inner == [(kept, kept)] * len(inner)
    assert last == (kept, (1, bucket_size(18, TARGETS)))


def noting(call: Any, seen: list) -> Any:
    def noted(self: Any, x_BTD: mx.array, *more: Any) -> mx.array:
        y_BTD: mx.array = call(self, x_BTD, *more)
        seen.append((x_BTD.shape[:2], y_BTD.shape[:2]))
        return y_BTD

    return noted


def dense(kept: KeptSlots, index_BT: np.ndarray) -> np.ndarray:
    """One where the slot takes its value from the kept one: (B * T, S)."""
    return np.eye(len(kept.slot_S))[index_BT.flatten()]


@pytest.mark.parametrize("name", BATCHES)
def test_spread_and_gather_are_moves_and_their_gradients_the_transposed(name: str) -> None:
    """But that nothing is added up for a slot that none sees, whose gradient is zero."""
    batch = BATCHES[name]
    (rows, T), found = batch.mask_BT.shape, kept_of(batch)
    kept = Slots(*(mx.array(array) for array in found if array is not None))
    S = len(found.slot_S)

    def by_head(x_LO: np.ndarray) -> np.ndarray:
        return x_LO.reshape(rows, T, H, K).swapaxes(1, 2)

    def double(x: np.ndarray) -> mx.array:
        return mx.array(x, mx.float64)

    x_1SO = random_array("x", (1, S, H * K), 1.0)
    d_LO = random_array("d", (rows * T, H * K), 1.0) * (histories(batch) >= 0).reshape(-1, 1)
    place_LS, home_LS = dense(found, found.place_BT), dense(found, found.home_BT)
    (rows_BHTK,), (d_1SO,) = mx.vjp(lambda x: kept.spread(x, H), [double(x_1SO)], [double(by_head(d_LO))])
    assert np.array_equal(rows_BHTK, by_head(place_LS @ x_1SO[0]))
    require("spread", [within_exact("gradient", np.array(d_1SO)[0], place_LS.T @ d_LO)])
    d_1SO = x_1SO * np.isin(np.arange(S), np.unique(found.place_BT[histories(batch) >= 0]))[:, None]
    (back_1SO,), (d_BHTK,) = mx.vjp(kept.gather, [double(by_head(d_LO))], [double(d_1SO)])
    assert np.array_equal(back_1SO[0], d_LO[found.slot_S])
    assert np.array_equal(d_BHTK, by_head(home_LS @ d_1SO[0]))


def batches_of(batching: str, batch_size: int = B, prompts: Sequence[int] = (0,)) -> list[Batch]:
    """A thousand, of rows from 8 to 1,024 tokens, a tenth to six tenths of them targets.

    Before them stands one of so many system prompts of these lengths.
    """
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(5.3, 0.7, 1000 * batch_size)).astype(int), 8, 1024)
    targets = np.maximum(1, random.uniform(0.1, 0.6, len(lengths)) * lengths).astype(int)
    shared = random.choice(prompts, len(lengths))
    examples = [
        example(int(n + s), int(t), num_shared=int(s))
        for n, t, s in zip(lengths, targets, shared, strict=True)
    ]
    config = TrainConfig(
        iters=1000, batch_size=batch_size, batching=batching, max_seq_length=1024 + max(prompts)
    )
    return [batch for window in training_windows(examples, config) for batch in window]


def shape_of(batch: Batch) -> tuple[int, ...]:
    """All that a compiled step's trace depends on."""
    kept = kept_slots(batch)
    kept_sizes = (len(kept.slot_S), kept.is_shared_S is None) if kept else (0, True)
    return (*batch.inputs_BT.shape, *kept_sizes, len(target_positions(batch)[0]))


@pytest.mark.parametrize(("batching", "at_most"), [("plain", 500), ("grouped", 300), ("packed", 10)])
def test_a_thousand_batches_have_few_shapes(batching: str, at_most: int) -> None:
    """Counted once, 411, 258 and 7: a bound against growth, not a derivation."""
    assert len({shape_of(batch) for batch in batches_of(batching)}) <= at_most


@pytest.mark.parametrize(("batching", "at_most"), [("plain", 650), ("grouped", 500), ("packed", 40)])
def test_system_prompts_of_eight_lengths_make_few_more(batching: str, at_most: int) -> None:
    """Two rows a batch, which all begin alike for 20 tokens at least; counted once, 578, 476 and 18."""
    batches = batches_of(batching, batch_size=2, prompts=(20, 35, 50, 64, 80, 100, 150, 200))
    assert len({shape_of(batch) for batch in batches}) <= at_most


def test_less_than_a_twentieth_of_what_is_computed_is_padding() -> None:
    """Whatever the order of the rows; 45% of the slots of these batches are padding."""
    batches = batches_of("plain")
    kept = [kept_slots(batch) for batch in batches]
    computed = sum(len(k.slot_S) if k else b.mask_BT.size for k, b in zip(kept, batches, strict=True))
    assert sum(batch.num_tokens for batch in batches) > 0.95 * computed
    assert sum(batch.num_tokens for batch in batches) < 0.6 * sum(batch.mask_BT.size for batch in batches)
