"""`tree_flatten(tree)[1]` is the second (name, array) pair, not the arrays.

In PyTorch and JAX, `tree_flatten` returns the leaves and a structure. In MLX it returns a list of
(name, array) pairs; `tree_unflatten` takes such a list, or a dict. So a parameter count over `[1]`
iterates over one name and one array.
"""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from tests.traps.tiny_lora import LORA_NAMES, names, tiny_lora


def test_wrong_index_one_is_a_pair() -> None:
    """It is the second parameter with its name."""
    name, array = tree_flatten(tiny_lora().trainable_parameters())[1]
    assert name == "layers.0.lora_b"
    assert array.shape == (2, 5)


def test_wrong_the_count_asks_a_name_for_its_size() -> None:
    """The plan's sum starts with the name of the second parameter."""
    trainable_params = tiny_lora().trainable_parameters()
    with pytest.raises(AttributeError) as error:
        sum(p.size for p in tree_flatten(trainable_params)[1])  # type: ignore[union-attr, misc]
    assert str(error.value) == "'str' object has no attribute 'size'"


@pytest.mark.parametrize("tree", [{}, {"w": mx.ones(3)}], ids=["none", "one"])
def test_wrong_fewer_than_two_parameters_have_no_index_one(tree: dict[str, mx.array]) -> None:
    """With nothing trainable, or one parameter, the same line fails another way."""
    with pytest.raises(IndexError) as error:
        sum(p.size for p in tree_flatten(tree)[1])  # type: ignore[union-attr, misc]
    assert str(error.value) == "list index out of range"


def test_wrong_nothing_unflattens_to_a_list() -> None:
    """`tree_unflatten` of nothing is `[]`, not `{}`."""
    assert tree_unflatten({}) == []
    assert tree_unflatten([]) == []


def test_right_the_count() -> None:
    """`sum(p.size for _, p in tree_flatten(tree))`: 3x2 + 2x5 + 5x2 + 2x4 = 34."""
    trainable_params = tiny_lora().trainable_parameters()
    assert sum(p.size for _, p in tree_flatten(trainable_params)) == 34


def test_right_a_flat_dict() -> None:
    """`tree_flatten(tree, destination={})` is the dict from name to array."""
    flat = tree_flatten(tiny_lora().trainable_parameters(), destination={})
    assert isinstance(flat, dict)
    assert sorted(flat) == LORA_NAMES


def test_right_a_flat_dict_unflattens() -> None:
    """The plan's `tree_unflatten({name: array})` does work: the list of layers comes back."""
    flat = dict(tree_flatten(tiny_lora().trainable_parameters()))
    tree = tree_unflatten(flat)
    assert names(tree) == list(flat)
    assert type(tree["layers"]) is list


def test_right_a_missing_layer_becomes_an_empty_one() -> None:
    """LoRA on the last layer only: an empty dict keeps its place in the list."""
    flat = dict(tree_flatten(tiny_lora().trainable_parameters()))
    tree = tree_unflatten({name: p for name, p in flat.items() if name.startswith("layers.1")})
    assert tree["layers"][0] == {}
    assert names(tree) == ["layers.1.lora_a", "layers.1.lora_b"]
