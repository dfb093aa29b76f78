"""The reference's plain windows and ours: the same examples, targets, positions and masks in every update."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import reference.data
import reference.generate
import reference.model
import reference.train
from mlx_impl.config import TrainConfig
from mlx_impl.data import Example, evaluation_batches, training_windows
from mlx_impl.generate import generate
from mlx_impl.model import CausalLM, attention_mask, position_ids
from mlx_impl.train import evaluate
from tests.tiny_model import TINY_LLAMA

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"__init__.py", "config.py"}  # configuration is data, which both read
PATTERN = sorted(path.name for path in (ROOT / "mlx_impl").glob("*.py") if path.name != "__main__.py")
RANDOM = np.random.default_rng(0)
SPEC = replace(TINY_LLAMA, vocab_size=99)
LENGTHS = [2, 9, 5, 17, 3, 30, 9, 4, 12, 2, 25, 7, 1]


def example(length: int) -> Example:
    tokens, is_target = RANDOM.integers(1, 99, length), RANDOM.random(length) < 0.5
    is_target[-1] = True
    return Example(tuple(tokens.tolist()), tuple(is_target.tolist()))


EXAMPLES = [example(length) for length in LENGTHS]
PLAIN = TrainConfig(iters=9, batch_size=2, grad_accumulation_steps=2, max_seq_length=31, data_seed=5)


@pytest.mark.parametrize("name", [name for name in PATTERN if name not in SHARED])
def test_every_file_of_the_pattern_has_its_counterpart_in_reference(name: str) -> None:
    """And each says in its docstring how it differs from the other."""
    for here, there in (("mlx_impl", "reference"), ("reference", "mlx_impl")):
        text = (ROOT / here / name).read_text(encoding="utf-8")
        assert f"Differs from {there}/{name}:" in text.replace("\n", " ")


@pytest.mark.parametrize("is_training", [True, False])
def test_evaluation_and_generation_leave_the_mode_as_it_was_in_both_twins(is_training: bool) -> None:
    """Also where a reader leaves before the answer has ended."""
    ours, theirs = CausalLM(SPEC), reference.model.CausalLM(SPEC)
    pairs = [(e.tokens, e.is_target) for e in EXAMPLES]
    for leave in (
        lambda: evaluate(ours, evaluation_batches(EXAMPLES, 4)),
        lambda: next(generate(ours, [3, 5], 4, ())),
        lambda: reference.train.evaluate(theirs, [reference.data.make_batch(pairs, [(0,), (1,)])]),
        lambda: next(reference.generate.generate(theirs, [3, 5], 4, ())),
    ):
        for model in (ours, theirs):
            model.train(is_training)
        leave()
        assert ours.training == theirs.training == is_training


@pytest.mark.parametrize("batching", ["plain", "grouped", "packed"])
def test_every_update_has_the_references_micro_batches(batching: str) -> None:
    """Over more than two epochs; ours may be wider, by padding alone."""
    config = replace(PLAIN, batching=batching)
    pairs = [(e.tokens, e.is_target) for e in EXAMPLES]
    expected = list(reference.data.training_windows(pairs, config))
    windows = list(training_windows(EXAMPLES, config))
    assert [len(window) for window in windows] == [len(window) for window in expected]
    for ours, theirs in zip(chain(*windows), chain(*expected), strict=True):
        width = theirs.inputs_BT.shape[1]
        assert theirs.segment_BT is not None and ours.inputs_BT.shape[1] >= width
        is_input_BT = theirs.segment_BT.numpy() >= 0  # what is in the padding does not matter
        for field in ("inputs_BT", "targets_BT"):
            values_BT = getattr(ours, field)[:, :width]
            np.testing.assert_array_equal(values_BT[is_input_BT], getattr(theirs, field).numpy()[is_input_BT])
        np.testing.assert_array_equal(ours.mask_BT[:, :width], theirs.mask_BT.numpy())
        assert not ours.mask_BT[:, width:].any()
        if batching == "packed":
            assert ours.segment_BT is not None
            np.testing.assert_array_equal(ours.segment_BT[:, :width], theirs.segment_BT.numpy())


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_masks_and_position_ids_of_packed_rows_are_the_references(window: int | None) -> None:
    segment_BT = np.array([[0, 0, 0, 1, 1, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1]])
    theirs = torch.tensor(segment_BT)
    mask_B1TS = attention_mask(8, 0, window, mx.array(segment_BT))
    expected = reference.model.attention_mask(8, window, theirs)
    np.testing.assert_array_equal(np.array(mask_B1TS), expected.numpy())
    positions = reference.model.position_ids(theirs)
    np.testing.assert_array_equal(np.array(position_ids(mx.array(segment_BT))), positions.numpy())
