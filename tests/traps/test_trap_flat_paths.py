"""A dotted path is not an attribute of an MLX module.

In PyTorch, "layers.0.lora_a" is a key of `state_dict()` and an argument of `get_parameter`. An MLX
module is a tree of dicts and lists: it cannot be updated from a flat dict of paths, and `setattr`
with a path adds a second parameter of the same name that nothing uses. The right form turns paths
into a tree with `tree_unflatten`, or gives (path, array) pairs to `load_weights`.
"""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from tests.traps.tiny_lora import LORA_NAMES, batch, names, tiny_lora

PATH = "layers.0.lora_a"
ZEROS = mx.zeros((3, 2))


def test_wrong_a_path_is_no_attribute() -> None:
    """Neither `getattr` nor an index finds it."""
    model = tiny_lora()
    with pytest.raises(AttributeError) as attribute_error:
        getattr(model, PATH)
    assert str(attribute_error.value) == f"'Tiny' object has no attribute '{PATH}'"
    with pytest.raises(KeyError, match=PATH):
        model[PATH]


def test_wrong_setting_a_path_adds_a_dead_parameter() -> None:
    """`setattr` succeeds. Now two parameters have one name, and the model still uses the old one."""
    model = tiny_lora()
    before = np.array(model(batch()))
    setattr(model, PATH, ZEROS)
    assert sorted(names(model.trainable_parameters())) == sorted([*LORA_NAMES, PATH])
    np.testing.assert_array_equal(np.array(model(batch())), before)


def test_wrong_updating_from_a_flat_dict_is_refused() -> None:
    """`model.update` needs the tree."""
    with pytest.raises(ValueError) as error:
        tiny_lora().update({PATH: ZEROS})
    assert str(error.value) == f'Module does not have parameter named "{PATH}".'


def test_wrong_updating_without_strict_is_ignored() -> None:
    """With `strict=False` the same call silently does nothing."""
    model = tiny_lora()
    before = np.array(model.layers[0].lora_a)
    model.update({PATH: ZEROS}, strict=False)
    np.testing.assert_array_equal(np.array(model.layers[0].lora_a), before)


def test_wrong_an_optimizer_cannot_read_flat_gradients() -> None:
    """`optimizer.update` walks the gradients and the model side by side."""
    with pytest.raises(KeyError, match=PATH):
        optim.AdamW(learning_rate=0.1).update(tiny_lora(), {PATH: ZEROS})


def test_right_unflatten_then_update() -> None:
    """`model.update(tree_unflatten({path: array}))` sets that parameter and no other."""
    model = tiny_lora()
    model.update(tree_unflatten({PATH: ZEROS}))
    assert mx.array_equal(model.layers[0].lora_a, ZEROS)
    assert sorted(names(model.trainable_parameters())) == LORA_NAMES


def test_right_load_weights_takes_pairs() -> None:
    """`model.load_weights([(path, array)], strict=False)` sets it too."""
    model = tiny_lora()
    model.load_weights([(PATH, ZEROS)], strict=False)
    assert mx.array_equal(model.layers[0].lora_a, ZEROS)
