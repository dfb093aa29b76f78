"""`too many values to unpack`: a parameter tree is not a list of (name, array) pairs.

PyTorch's `named_parameters()` yields pairs. MLX's `parameters()` and `trainable_parameters()`
return a nested dict. A loop over it yields the keys, and `for path, p in` unpacks the characters
of a key. `tree_flatten` returns the pairs.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from tests.traps.tiny_lora import LORA_NAMES, tiny_lora


def test_wrong_the_characters_of_a_key_are_unpacked() -> None:
    """The only key is "layers": six characters for two variables."""
    with pytest.raises(ValueError, match="too many values to unpack"):
        for _path, _p in tiny_lora().trainable_parameters():  # type: ignore[str-unpack]
            pass


def test_wrong_one_letter_names_give_too_few() -> None:
    """A parameter called "w" has one character for two variables."""
    model: Any = nn.Module()
    model.w = mx.ones(3)
    with pytest.raises(ValueError) as error:
        for _path, _p in model.trainable_parameters():
            pass
    assert str(error.value) == "not enough values to unpack (expected 2, got 1)"


def test_wrong_two_letter_names_unpack_in_silence() -> None:
    """A layer called "up" silently becomes the path "u" and the parameter "p"."""
    model: Any = nn.Module()
    model.up = nn.Linear(3, 5)
    assert [(path, p) for path, p in model.trainable_parameters()] == [("u", "p")]


def test_wrong_there_is_no_named_parameters() -> None:
    """The PyTorch method does not exist."""
    with pytest.raises(AttributeError) as error:
        tiny_lora().named_parameters()  # type: ignore[attr-defined]
    assert str(error.value) == "'Tiny' object has no attribute 'named_parameters'"


def test_right_tree_flatten_yields_named_arrays() -> None:
    """`for path, p in tree_flatten(model.trainable_parameters())`."""
    shapes = {path: p.shape for path, p in tree_flatten(tiny_lora().trainable_parameters())}
    assert sorted(shapes) == LORA_NAMES
    assert list(shapes.values()) == [(3, 2), (2, 5), (5, 2), (2, 4)]
