"""Sliding windows and packed rows: which keys each query attends, and that nothing else reaches it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.generate import KeyValueCache
from mlx_impl.model import CausalLM, attention_mask, position_ids
from tests.derived import compare
from tests.lora_ladder.cases import SPEC

SEGMENT_BT = mx.array([[0, 0, 0, 1, 1, -1, -1], [5, 2, 2, 2, 2, 2, 2]])
WINDOW = 3


def model_of(window: int | None) -> CausalLM:
    mx.random.seed(0)
    return CausalLM(replace(SPEC, sliding_window=window)).eval()


def test_without_window_and_packing_there_is_no_mask() -> None:
    assert attention_mask(5, 2, None, None) is None
    assert attention_mask(5, 2, 7, None) is None


def test_position_ids_start_again_in_every_example() -> None:
    assert position_ids(SEGMENT_BT).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]]


def test_a_packed_token_attends_the_past_of_its_own_example() -> None:
    mask: np.ndarray = np.array(attention_mask(7, 0, None, SEGMENT_BT))
    expected = [
        [t >= s and row[t] == row[s] for t in range(7) for s in range(7)] for row in SEGMENT_BT.tolist()
    ]
    assert mask.reshape(2, -1).tolist() == expected


def test_a_token_attends_itself_and_window_less_one_before_it() -> None:
    mask: np.ndarray = np.array(attention_mask(2, 4, WINDOW, None))
    assert mask.squeeze().tolist() == [[s in (2, 3, 4) for s in range(6)], [s in (3, 4, 5) for s in range(6)]]


def test_a_window_applies_within_packed_examples_too() -> None:
    mask: np.ndarray = np.array(attention_mask(7, 0, 2, SEGMENT_BT))
    assert mask[1, 0, 6].tolist() == [False] * 5 + [True, True]


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_packed_row_has_the_hidden_states_of_its_examples_alone(window: int | None) -> None:
    """Within rounding: rope's angles come from another formula, and softmax sums over more zeros."""
    model = model_of(window)
    tokens = mx.array(np.random.default_rng(1).integers(0, SPEC.vocab_size, (1, 11)))
    segment_BT = mx.array([[0] * 6 + [1] * 5])
    packed = np.array(model.model(tokens, segment_BT))[0]
    for part in (slice(0, 6), slice(6, 11)):
        alone = np.array(model.model(tokens[:, part]))[0]
        verdict = compare("hidden states", packed[part], alone, alone.astype(np.float64), SPEC.vocab_size)
        assert verdict.used <= 1, verdict.report


def test_a_token_before_every_window_changes_no_bit() -> None:
    """Two layers reach 2 * (window - 1) tokens back."""
    model = model_of(WINDOW)
    depth = SPEC.num_hidden_layers * (WINDOW - 1)
    tokens = np.random.default_rng(2).integers(0, SPEC.vocab_size, (2, depth + 6))
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % SPEC.vocab_size
    before, after = (np.array(model(mx.array(t))) for t in (tokens, changed))
    assert np.array_equal(before[:, depth + 1 :], after[:, depth + 1 :])
    assert not np.array_equal(before[:, depth], after[:, depth])


def test_a_sliding_window_with_a_cache_has_the_same_hidden_states() -> None:
    model = model_of(WINDOW)
    tokens = mx.array(np.random.default_rng(3).integers(0, SPEC.vocab_size, (2, 12)))
    whole, caches = np.array(model.model(tokens)), [KeyValueCache() for _ in model.model.layers]
    parts = [model.model(tokens[:, a:b], caches=caches) for a, b in ((0, 5), (5, 6), (6, 7), (7, 12))]
    cached = np.array(mx.concatenate(parts, axis=1))
    verdict = compare("hidden states", cached, whole, whole.astype(np.float64), SPEC.vocab_size)
    assert verdict.used <= 1, verdict.report
