"""Batching: whatever shares a row or a batch, every example is seen once, and the gradients are the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_impl.batching import pack_rows, rows_of, updates_an_epoch, window_rows
from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch, Example, make_batch, make_packed_batch, training_windows
from tests.derived import Divergence, assert_within_rounding
from tests.ladder.cases import SPEC, Case, copies, named_case
from tests.ladder.protocol import Dialect
from tests.trainers.mlx_impl import MlxTrainer, PlainTrainer
from tests.trainers.reference import oracle

DTYPES = (torch.float32, torch.float64)
LENGTHS = np.random.default_rng(3).integers(1, 40, 61).tolist()
KINDS = ("plain", "grouped", "packed")
RANDOM = np.random.default_rng(4)
EXAMPLES = [
    Example(tuple(RANDOM.integers(1, SPEC.vocab_size, n).tolist()), (False,) * p + (True,) * (n - p))
    for n, p in ((9, 4), (3, 1), (12, 11), (5, 0), (2, 1), (7, 3))
]
PACKED = [(0, 1, 4), (5, 3), (2,)]  # rows of 8 + 2 + 1, 6 + 4 and 11 inputs

fast_and_plain = pytest.mark.parametrize("trainer", [MlxTrainer, PlainTrainer], ids=["fast", "plain"])


def config(batching: str, **more: Any) -> TrainConfig:
    return TrainConfig(**{"iters": 1, "batch_size": 3, "max_seq_length": 50, **more}, batching=batching)


def numbers_of(steps: range, training: TrainConfig) -> list[list[int]]:
    rows = rows_of(LENGTHS, training)
    windows = [window_rows(step, rows, LENGTHS, training) for step in steps]
    return [[n for batch in window for row in batch for n in row] for window in windows]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("batching", KINDS)
def test_every_example_is_seen_once_an_epoch(batching: str, accumulated: int) -> None:
    training = config(batching, grad_accumulation_steps=accumulated)
    steps = updates_an_epoch(LENGTHS, training)
    epochs = [numbers_of(range(e * steps, (e + 1) * steps), training) for e in (0, 1)]
    for epoch in epochs:
        assert Counter(n for window in epoch for n in window) == Counter(range(len(LENGTHS)))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("batching", KINDS)
def test_an_update_s_examples_follow_from_its_number(batching: str) -> None:
    examples = [Example((1,) * (n + 1), (True,) * (n + 1)) for n in LENGTHS]
    training = config(batching, iters=50)
    whole = [[b.numbers for b in w] for w in training_windows(examples, training)]
    assert [[b.numbers for b in w] for w in training_windows(examples, training, 33)] == whole[33:]
    other = training_windows(examples, config(batching, iters=50, data_seed=1))
    assert [[b.numbers for b in w] for w in other] != whole


def test_plain_batches_are_slices_of_the_epochs_permutation() -> None:
    """As they always were: a run of before can be gone on with."""
    order = np.random.default_rng([0, 1]).permutation(len(LENGTHS)).tolist()
    training = config("plain", grad_accumulation_steps=2)
    assert numbers_of(range(11, 22), training) == [order[i : i + 6] for i in range(0, len(LENGTHS), 6)]


def test_grouped_batches_are_of_like_length_and_of_one_size_but_one() -> None:
    def padding(batching: str) -> int:
        steps = range(updates_an_epoch(LENGTHS, config(batching)))
        batches = [[LENGTHS[n] for n in window] for window in numbers_of(steps, config(batching))]
        assert Counter(map(len, batches)) == {3: 20, 1: 1}
        return sum(len(batch) * max(batch) - sum(batch) for batch in batches)

    assert padding("grouped") < padding("plain") / 4


def test_packed_rows_hold_at_most_the_maximum_and_few_are_needed() -> None:
    rows = pack_rows(LENGTHS, 50, seed=0)
    sums = [sum(LENGTHS[n] for n in row) for row in rows]
    assert max(sums) <= 50
    assert len(rows) <= 1.22 * -(-sum(LENGTHS) // 50) + 1  # best-fit decreasing: 11/9 of the optimum, + 1
    assert pack_rows([60, 3], 50, seed=0) == [(0,), (1,)]  # one too long is alone


def test_a_packed_row_is_its_examples_one_after_another() -> None:
    """By hand: 1 2 3 and 4 5, of which 2 is no target."""
    examples = [Example((1, 2, 3), (False, False, True)), Example((4, 5), (True, True))]
    batch = make_packed_batch(examples, [(0, 1)])
    assert batch.inputs_BT[0, :4].tolist() == [1, 2, 4, 0]
    assert batch.targets_BT[0, :3].tolist() == [2, 3, 5]
    assert batch.mask_BT[0, :4].tolist() == [False, True, True, False]
    assert batch.segment_BT is not None
    assert batch.segment_BT[0, :4].tolist() == [0, 0, 1, -1]
    assert (batch.num_tokens, batch.numbers) == (3, (0, 1))


def answers(trainer: Any, case: Case, batch: Batch) -> dict[str, np.ndarray]:
    """The loss and every factor's gradient, B not 0."""
    built = trainer(case.spec, copies(case.weights), case.lora, copies(case.factors))
    nats, num_targets = built.loss(batch)
    return {"nats": np.array(nats), "targets": np.array(num_targets), **built.gradients(batch)}


def hold_to_the_unpacked(case: Case, packed: Batch, trainer: Any) -> None:
    """The oracle is PyTorch, in float32 and in float64, on one example a row."""
    plain = make_batch(EXAMPLES)
    ref32, ref64 = (answers(oracle(Dialect(), t), case, plain) for t in DTYPES)
    ours = answers(trainer, case, packed)
    assert_within_rounding("a packed batch", ours, ref32, ref64, max(case.longest_sum, packed.inputs_BT.size))


@fast_and_plain
@pytest.mark.parametrize("name", ["untied", "sliding window", "qk norm", "dora"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_examples_unpacked(name: str, trainer: Any) -> None:
    hold_to_the_unpacked(named_case(name), make_packed_batch(EXAMPLES, PACKED), trainer)


@pytest.mark.parametrize("name", ["untied", "sliding window"])
def test_the_logits_of_a_packed_example_are_its_own(name: str) -> None:
    case, packed = named_case(name), make_packed_batch(EXAMPLES, PACKED)
    model = MlxTrainer(case.spec, copies(case.weights), case.lora, copies(case.factors)).model.eval()
    assert packed.segment_BT is not None
    arrays = mx.array(packed.inputs_BT), mx.array(packed.segment_BT)
    logits_BTV = np.array(model(*arrays))
    alone = [
        oracle(Dialect(), t)(case.spec, copies(case.weights), case.lora, copies(case.factors)) for t in DTYPES
    ]
    assert packed.segment_BT is not None
    for b, row in enumerate(PACKED):
        for segment, number in enumerate(row):
            tokens_BT = np.array([EXAMPLES[number].tokens[:-1]])
            ours, (ref32, ref64) = (
                logits_BTV[b][packed.segment_BT[b] == segment],
                (t.logits(tokens_BT)[0] for t in alone),
            )
            assert_within_rounding("logits", {"l": ours}, {"l": ref32}, {"l": ref64}, case.longest_sum)


@fast_and_plain
def test_a_mask_that_leaks_from_one_example_to_the_next_is_noticed(trainer: Any) -> None:
    """The mutant: rows without segment numbers."""
    leaking = make_packed_batch(EXAMPLES, PACKED)._replace(segment_BT=None)
    with pytest.raises(Divergence, match="a packed batch"):
        hold_to_the_unpacked(named_case("untied"), leaking, trainer)
