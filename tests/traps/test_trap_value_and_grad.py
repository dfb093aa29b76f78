"""`mx.value_and_grad` over a module differentiates everything the module holds.

PyTorch's autograd skips parameters with `requires_grad=False`. In MLX a Module is a dict, and
`mx.value_and_grad(loss_fn)(model, ...)` differentiates every array in it, frozen or not.
`nn.value_and_grad(model, loss_fn)` is the one that respects `freeze()`.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from tests.traps.tiny_lora import LORA_NAMES, batch, loss_fn, names, tiny_lora


class Extras(nn.Module):
    """A linear layer with a private array, as a mask or a table of frequencies would be."""

    settings: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self._mask = mx.ones(5)

    def __call__(self, x_BI: mx.array) -> mx.array:
        return self.linear(x_BI) * self._mask


def test_wrong_frozen_parameters_get_gradients_too() -> None:
    """It runs, and returns gradients for all eight parameters instead of the four trainable ones."""
    model = tiny_lora()
    _, grads = mx.value_and_grad(loss_fn)(model, batch())
    assert sorted(names(grads)) == sorted(names(model.parameters()))
    assert len(names(grads)) == 8
    assert sorted(names(model.trainable_parameters())) == LORA_NAMES


def test_wrong_the_optimizer_then_moves_frozen_weights() -> None:
    """An optimizer does not look at `freeze()` either: it moves whatever has a gradient."""
    model = tiny_lora()
    before = np.array(model.layers[0].linear.weight)
    _, grads = mx.value_and_grad(loss_fn)(model, batch())
    optim.SGD(learning_rate=0.1).update(model, grads)
    assert np.all(np.array(model.layers[0].linear.weight) != before)


def test_wrong_private_arrays_get_gradients() -> None:
    """An array in a `_private` attribute is not a parameter, but it gets a gradient."""
    model = Extras()
    _, grads = mx.value_and_grad(loss_fn)(model, batch())
    assert "_mask" in names(grads)
    assert "_mask" not in names(model.parameters())


def test_wrong_a_quantized_base_has_no_gradient() -> None:
    """With a quantized layer it raises, because packed weights have no gradient."""
    model = nn.QuantizedLinear(32, 64, group_size=32, bits=4)
    with pytest.raises(RuntimeError) as error:
        mx.value_and_grad(loss_fn)(model, mx.ones((2, 32)))
    assert str(error.value) == "[QuantizedMatmul::vjp] no gradient wrt the quantized weights."


def test_wrong_an_attribute_that_is_no_array_is_refused() -> None:
    """A dict of settings is part of the module's tree, but it holds no arrays."""
    model = Extras()
    model.settings = {"rank": 8}
    with pytest.raises(ValueError) as error:
        mx.value_and_grad(loss_fn)(model, batch())
    assert str(error.value) == "[tree_flatten] The argument should contain only arrays"


def test_right_nn_value_and_grad_returns_the_trainable_gradients_only() -> None:
    """The gradients have the names of `model.trainable_parameters()`."""
    model = tiny_lora()
    _, grads = nn.value_and_grad(model, loss_fn)(model, batch())
    assert sorted(names(grads)) == sorted(names(model.trainable_parameters())) == LORA_NAMES


def test_right_frozen_bytes_stay() -> None:
    """After an update the LoRA matrices have moved and the base has the same bytes."""
    model = tiny_lora()
    layer = model.layers[0]
    weight, lora_a = np.array(layer.linear.weight), np.array(layer.lora_a)
    _, grads = nn.value_and_grad(model, loss_fn)(model, batch())
    optim.SGD(learning_rate=0.1).update(model, grads)
    assert np.array(layer.linear.weight).tobytes() == weight.tobytes()
    assert np.all(np.array(layer.lora_a) != lora_a)


def test_right_private_arrays_and_settings_are_left_alone() -> None:
    """`nn.value_and_grad` reads parameters only."""
    model = Extras()
    model.settings = {"rank": 8}
    _, grads = nn.value_and_grad(model, loss_fn)(model, batch())
    assert sorted(names(grads)) == ["linear.bias", "linear.weight"]


def test_right_gradients_pass_through_a_quantized_layer() -> None:
    """A quantized layer is created with frozen weights, and the layer before it gets gradients."""
    model = nn.Sequential(nn.Linear(3, 32), nn.QuantizedLinear(32, 64, group_size=32, bits=4))
    _, grads = nn.value_and_grad(model, loss_fn)(model, batch())
    assert names(grads) == ["layers.0.weight", "layers.0.bias"]
    assert mx.any(grads["layers"][0]["weight"]).item()
