"""A store of examples is a sequence of the same examples, in a few bytes a token."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_impl.data import Example
from mlx_impl.run.state import digest_of_examples
from mlx_impl.text.example_store import ExampleStore


def examples(count: int) -> list[Example]:
    draw = np.random.default_rng(2)
    lengths = draw.integers(0, 5, count).tolist()
    rows = [draw.integers(0, 2**31 - 1, length).tolist() for length in lengths]
    return [Example(tuple(row), tuple(token % 2 == 0 for token in row)) for row in rows]


def stored(given: list[Example]) -> ExampleStore:
    store = ExampleStore()
    for example in given:
        store.append(example)
    return store


def test_a_store_is_a_sequence_of_the_same_examples() -> None:
    given = examples(40)
    store = stored(given)
    assert list(store) == given and store == given and [store[i] for i in range(-40, 40)] == given * 2
    assert store[3:30:4] == given[3:30:4] and store[::-1] == given[::-1] and len(store) == 40
    assert isinstance(store[0].tokens, tuple) and all(
        type(is_target) is bool for is_target in store[1].is_target
    )
    assert stored([]) == [] and not stored([]) and store != given[1:]
    with pytest.raises(IndexError):
        store[40]


def test_its_digest_is_that_of_the_list_and_changes_with_it() -> None:
    given = examples(7)
    store = stored(given[:6])
    assert digest_of_examples(store) == digest_of_examples(given[:6]) == digest_of_examples(store)
    store.append(given[6])
    assert digest_of_examples(store) == digest_of_examples(given)
