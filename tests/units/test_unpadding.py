"""Unpadding and prefix sharing skip work, and change neither the loss nor a gradient.

The oracle is the plain path, which computes every position of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import (
    SMALLEST_BUCKET,
    Batch,
    Example,
    bucket_size,
    make_batch,
    make_packed_batch,
    training_windows,
)
from mlx_impl.fast import forward, ops
from mlx_impl.fast.forward import FAST
from mlx_impl.fast.kept_positions import (
    KEPT_BUCKETS,
    TARGET_BUCKETS,
    KeptPositions,
    kept_positions,
    shared_prefix_length,
)
from mlx_impl.fast.unpadding import Unpadding
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from mlx_impl.train import PLAIN, Loss
from tests.derived import Divergence, require, within_exact
from tests.lora_ladder.cases import SPEC, random_array
from tests.lora_ladder.protocol import Arrays
from tests.nightly import mostly_at_night
from tests.trainers.exact_ops import in_place_of_production

pytestmark = pytest.mark.usefixtures("on_the_cpu")

B, T, H, K = 4, 24, 3, 5


def example(length: int, num_targets: int, num_after: int = 0, num_shared: int = 0) -> Example:
    """Shared tokens, a prompt, targets, and tokens after the last target."""
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
    "every token a target, and padded targets at the first position": make_batch(EVERY_TOKEN),
}
NUM_SHARED = dict(zip(BATCHES, (0, 0, 9, 9, 9, 24, 10), strict=True))


def kept_of(batch: Batch) -> KeptPositions:
    return kept_positions(batch) or pytest.fail("every position was kept")


def histories(batch: Batch) -> np.ndarray:
    """For each position a number for the tokens up to it; -1 if no target depends on it."""
    numbers: dict[bytes, int] = {}
    rows = zip(batch.inputs_BT, batch.mask_BT, strict=True)
    return np.array([[numbers.setdefault(tokens[: t + 1].tobytes(), len(numbers)) if mask[t:].any() else -1
                      for t in range(len(tokens))] for tokens, mask in rows])  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_each_needed_position_takes_its_value_from_one_with_the_same_history(name: str) -> None:
    batch = BATCHES[name]
    kept, history_BT = kept_of(batch), histories(batch)
    is_needed_BT = history_BT >= 0
    assert (history_BT.flat[kept.kept_U[kept.source_BT]] == history_BT)[is_needed_BT].all()
    assert (0 if kept.is_shared_U is None else kept.is_shared_U.sum()) == NUM_SHARED[name]
    assert len(kept.kept_U) == len(np.unique(kept.kept_U)) < batch.mask_BT.size


@pytest.mark.parametrize("name", BATCHES)
def test_each_kept_position_is_in_one_place_and_a_dummy_in_all_others(name: str) -> None:
    batch = BATCHES[name]
    kept, is_kept_BT = kept_of(batch), is_kept(kept_of(batch))
    assert is_kept_BT.sum() == len(kept.kept_U)
    (dummy,) = np.unique(kept.own_BT[~is_kept_BT])
    assert not kept.is_needed_U[dummy]
    assert dummy not in np.unique(kept.source_BT[histories(batch) >= 0])


def is_kept(kept: KeptPositions) -> np.ndarray:
    """Where in (B, T) a kept position is its own."""
    return kept.kept_U[kept.own_BT] == np.arange(kept.own_BT.size).reshape(kept.own_BT.shape)


def test_without_padding_or_a_shared_prefix_every_position_is_kept() -> None:
    assert kept_positions(make_batch([example(24, 24)] + [example(23, 23)] * (B - 1))) is None


@pytest.mark.parametrize(("length", "shared"), [(79, 10), (80, 10), (81, 0)])
def test_a_prefix_is_shared_only_if_it_saves_a_sixteenth_of_the_positions(length: int, shared: int) -> None:
    batch = make_batch([example(length, 2, num_shared=10), example(length - 1, 2, num_shared=10)])
    is_needed_BT = np.arange(batch.mask_BT.shape[1]) < np.array([[length], [length]])
    assert shared_prefix_length(batch, is_needed_BT) == shared


def test_a_dummy_is_a_repeated_token_of_the_prefix_if_there_is_one() -> None:
    """Padding nobody depends on, so its hidden state might not be finite."""
    batch = BATCHES["one system prompt, the first row without a target"]
    kept = kept_of(batch)
    assert histories(batch).flat[kept.kept_U[~kept.is_needed_U][0]] >= 0


def test_a_shared_prefix_ends_at_another_token() -> None:
    row, is_input_BT = example(38, 2), np.arange(40) < np.array([[38], [38]])
    batch = make_batch([row, row])
    assert shared_prefix_length(batch, is_input_BT) == 38
    other_token = batch._replace(inputs_BT=batch.inputs_BT + [[0], [1]] * (np.arange(40) == 30))
    assert shared_prefix_length(other_token, is_input_BT) == 30


@pytest.mark.parametrize("an_octave", [4, 8])
def test_shape_buckets_are_few_and_waste_little(an_octave: int) -> None:
    counts = np.arange(1, 8193)
    sizes = np.array([bucket_size(int(n), an_octave) for n in counts])
    assert (sizes >= counts).all()
    assert (sizes - counts < np.maximum(SMALLEST_BUCKET, counts / an_octave)).all()
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


def results(model: CausalLM, batch: Batch, loss: Loss, compiled: bool = False) -> Arrays:
    run = nn.value_and_grad(model, lambda arrays: loss.batch_loss(model, arrays))
    if compiled:
        state = [model.state, mx.random.state]
        run = mx.compile(run, inputs=state, outputs=state)
    with in_place_of_production():
        (nats, _), gradients = run(loss.to_arrays(batch))
    return {"nats": np.array(nats), **{name: np.array(value) for name, value in tree_flatten(gradients)}}


def hold_to_the_plain_path(model: CausalLM, batch: Batch, compiled: bool = False) -> None:
    ours, plain = results(model, batch, FAST, compiled), results(model, batch, PLAIN)
    require("unpadded", [within_exact(name, ours[name], plain[name]) for name in plain])


SHARED_OR_NOT = pytest.mark.parametrize("name", ["unequal lengths", "one system prompt"])


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_are_those_of_every_position_computed(name: str) -> None:
    hold_to_the_plain_path(model_of(), BATCHES[name])


def test_compiled_too() -> None:
    hold_to_the_plain_path(model_of(), BATCHES["one system prompt"], compiled=True)


@SHARED_OR_NOT
def test_checkpointed_too(name: str) -> None:
    model = model_of()
    model.model.grad_checkpoint = True
    hold_to_the_plain_path(model, BATCHES[name])


@SHARED_OR_NOT
def test_with_a_sliding_window_too(name: str) -> None:
    hold_to_the_plain_path(model_of(sliding_window=6), BATCHES[name])


@pytest.mark.parametrize("rows", [UNEQUAL, ONE_PROMPT])
def test_with_packed_rows_too(rows: list[Example]) -> None:
    hold_to_the_plain_path(model_of(), make_packed_batch(rows, [(0,), (1, 2), (3,)]))


def test_a_needed_position_in_the_place_of_a_dummy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: positions that are left out pass their gradient to a token that counts."""

    def careless(batch: Batch, is_packed: bool) -> KeptPositions:
        kept = kept_of(batch)
        return kept._replace(own_BT=np.where(is_kept(kept), kept.own_BT, 0))

    monkeypatch.setattr("mlx_impl.fast.kept_positions.kept_positions", careless)
    with pytest.raises(Divergence):
        hold_to_the_plain_path(model_of(), BATCHES["unequal lengths"])


def test_a_shared_position_with_the_gradient_of_one_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the sum over the rows is left out."""
    monkeypatch.setattr(Unpadding, "sum_over_rows", Unpadding.take)
    with pytest.raises(Divergence):
        hold_to_the_plain_path(model_of(), BATCHES["one system prompt"])


@pytest.mark.parametrize(("name", "needed"), [("unequal lengths", 45), ("one system prompt", 57 - 3 * 9)])
def test_blocks_compute_the_kept_positions_and_the_last_feed_forward_the_targets(
    name: str, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, not seconds: 51 and 63 inputs, of which 6 come after a row's last target; 18 targets."""
    model, batch = model_of(), BATCHES[name]
    sizes: list[Any] = []
    monkeypatch.setattr(forward, "block", noting(forward.block, sizes))
    results(model, batch, FAST)
    kept = (1, bucket_size(needed + 1, KEPT_BUCKETS))
    *inner, last = sizes
    assert (batch.mask_BT.sum(), batch.mask_BT.size) == (18, 96)
    assert inner == [(kept, kept)] * (SPEC.num_hidden_layers - 1)
    assert last == (kept, (1, bucket_size(18, TARGET_BUCKETS)))


def noting(block: Any, sizes: list) -> Any:
    def noted(layer: Any, x_BTD: mx.array, layout: Any) -> mx.array:
        y_BTD: mx.array = block(layer, x_BTD, layout)
        sizes.append((x_BTD.shape[:2], y_BTD.shape[:2]))
        return y_BTD

    return noted


def dense(kept: KeptPositions, index_BT: np.ndarray) -> np.ndarray:
    """(B * T, S): 1 where the position takes its value from the kept one, else 0."""
    return np.eye(len(kept.kept_U))[index_BT.flatten()]


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_scatter_and_gather_are_matrices_of_0_and_1_and_their_gradients_the_transposed(
    name: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But nothing is added up for a position that no target depends on: its gradient is zero."""
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    batch = BATCHES[name]
    (rows, T), kept = batch.mask_BT.shape, kept_of(batch)
    unpadding = Unpadding(*(mx.array(array) for array in kept if array is not None))
    U = len(kept.kept_U)

    def by_head(x_LO: np.ndarray) -> np.ndarray:
        return x_LO.reshape(rows, T, H, K).swapaxes(1, 2)

    def double(x: np.ndarray) -> mx.array:
        return mx.array(x, mx.float64)

    x_1UO = random_array("x", (1, U, H * K), 1.0)
    d_LO = random_array("d", (rows * T, H * K), 1.0) * (histories(batch) >= 0).reshape(-1, 1)
    source_LU, own_LU = dense(kept, kept.source_BT), dense(kept, kept.own_BT)
    (rows_BHTK,), (d_1UO,) = mx.vjp(
        lambda x: unpadding.scatter(x, H), [double(x_1UO)], [double(by_head(d_LO))]
    )
    assert np.array_equal(rows_BHTK, by_head(source_LU @ x_1UO[0]))
    require("scatter", [within_exact("gradient", np.array(d_1UO)[0], source_LU.T @ d_LO)])
    d_1UO = x_1UO * kept.is_needed_U[:, None]
    (back_1UO,), (d_BHTK,) = mx.vjp(unpadding.gather, [double(by_head(d_LO))], [double(d_1UO)])
    assert np.array_equal(back_1UO[0], d_LO[kept.kept_U])
    assert np.array_equal(d_BHTK, by_head(own_LU @ d_1UO[0]))
    assert bool(unpadding.indices) is not on_gpu  # which has none of each head


def batches_of(batching: str, batch_size: int = B, prompts: Sequence[int] = (0,)) -> list[Batch]:
    """A thousand, with rows of 8 to 1,024 tokens, a tenth to six tenths of them targets.

    Each row begins with a system prompt; `prompts` are the lengths to choose from.
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


def shape_of(batch: Batch) -> tuple[Any, ...]:
    """All sizes that a compiled step depends on."""
    *arrays, sub_batches, kept = FAST.to_arrays(batch)
    return *(array.shape for array in (*arrays, *kept)), *sub_batches


@pytest.mark.parametrize(
    ("batching", "at_most"), mostly_at_night([("plain", 500), ("grouped", 300), ("packed", 100)], 1)
)
def test_a_thousand_batches_have_few_shapes(batching: str, at_most: int) -> None:
    """Counted once, 411, 264 and 81: a bound against growth, not a derivation."""
    batches = batches_of(batching)
    shapes = {shape_of(batch) for batch in batches}
    inputs, kept = zip(
        *((arrays[0].size, arrays[-1]) for arrays in map(FAST.to_arrays, batches)), strict=True
    )
    computed = [len(k[0]) if k else size for size, k in zip(inputs, kept, strict=True)]
    of_a_token = np.array([sum(inputs), sum(computed)]) / sum(batch.num_tokens for batch in batches)
    print(f"{len(shapes)} shapes; positions a token in attention and elsewhere: {of_a_token}")
    assert len(shapes) <= at_most


@pytest.mark.parametrize(
    ("batching", "at_most"), mostly_at_night([("plain", 650), ("grouped", 500), ("packed", 190)], 1)
)
def test_system_prompts_of_eight_lengths_add_few_shapes(batching: str, at_most: int) -> None:
    """Two rows a batch, which share at least 20 tokens; counted once, 578, 476 and 158."""
    batches = batches_of(batching, batch_size=2, prompts=(20, 35, 50, 64, 80, 100, 150, 200))
    assert len({shape_of(batch) for batch in batches}) <= at_most


def test_less_than_a_twentieth_of_the_computed_positions_is_padding() -> None:
    """In any order of the rows; 45% of the positions of these batches are padding."""
    batches = batches_of("plain")
    kept = [kept_positions(batch) for batch in batches]
    computed = sum(len(k.kept_U) if k else b.mask_BT.size for k, b in zip(kept, batches, strict=True))
    assert sum(batch.num_tokens for batch in batches) > 0.95 * computed
    assert sum(batch.num_tokens for batch in batches) < 0.6 * sum(batch.mask_BT.size for batch in batches)
