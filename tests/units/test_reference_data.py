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
import reference.model
from mlx_impl.config import TrainConfig
from mlx_impl.data import Example, training_windows
from mlx_impl.model import attention_mask, position_ids

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"__init__.py", "config.py"}  # configuration is data, which both read
PATTERN = sorted(path.name for path in (ROOT / "mlx_impl").glob("*.py") if path.name != "__main__.py")
RANDOM = np.random.default_rng(0)
LENGTHS = [2, 9, 5, 17, 3, 30, 9, 4, 12, 2, 25, 7, 1]


def example(length: int) -> Example:
    tokens, is_target = RANDOM.integers(1, 99, length), RANDOM.random(length) < 0.5
    is_target[-1] = True
    return Example(tuple(tokens.tolist()), tuple(is_target.tolist()))


EXAMPLES = [example(length) for length in LENGTHS]
PLAIN = TrainConfig(iters=9, batch_size=2, grad_accumulation_steps=2, max_seq_length=31, data_seed=5)


@pytest.mark.parametrize("name", [name for name in PATTERN if name not in SHARED])
def test_every_file_of_the_pattern_has_its_counterpart_in_reference(name: str) -> None:
    assert (ROOT / "reference" / name).exists()
    text = (ROOT / "mlx_impl" / name).read_text(encoding="utf-8")
    assert f"Differs from reference/{name}:" in text.replace("\n", " ")


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
