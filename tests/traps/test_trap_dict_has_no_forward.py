"""`'dict' object has no attribute 'forward'`: the loss gets a parameter tree instead of the model.

In PyTorch, parameters carry their gradients, and the loss calls the model. In MLX, the argument
itself is differentiated: differentiate with respect to `model.trainable_parameters()`, and the loss
receives that dict. Nothing "converts the model to a dict". The right form passes the model and calls
it, or puts the tree back with `model.update(tree)`. A Module has no `forward` either: call it.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.traps.tiny_lora import arrays, batch, loss_fn, names, tiny_lora


def forward_loss_fn(model: Any, x_BI: mx.array) -> mx.array:
    """The PyTorch spelling."""
    y_BO: mx.array = model.forward(x_BI)
    return mx.mean(mx.square(y_BO))


def test_wrong_a_parameter_tree_has_no_forward() -> None:
    """Differentiate with respect to the tree, and the loss gets the tree, a dict."""
    model = tiny_lora()
    with pytest.raises(AttributeError) as error:
        mx.value_and_grad(forward_loss_fn)(model.trainable_parameters(), batch())
    assert str(error.value) == "'dict' object has no attribute 'forward'"


def test_wrong_a_parameter_tree_is_not_callable() -> None:
    """Replacing `.forward(x)` by a call only changes the message."""
    model = tiny_lora()
    with pytest.raises(TypeError) as error:
        mx.value_and_grad(loss_fn)(model.trainable_parameters(), batch())
    assert str(error.value) == "'dict' object is not callable"


def test_wrong_nn_value_and_grad_called_with_the_tree() -> None:
    """`nn.value_and_grad` passes its arguments to the loss unchanged: a tree stays a tree."""
    model = tiny_lora()
    step = nn.value_and_grad(model, forward_loss_fn)
    with pytest.raises(AttributeError) as error:
        step(model.trainable_parameters(), batch())
    assert str(error.value) == "'dict' object has no attribute 'forward'"


def test_wrong_a_module_has_no_forward_either() -> None:
    """With the model in place of the tree, `.forward` still fails."""
    model = tiny_lora()
    with pytest.raises(AttributeError) as error:
        nn.value_and_grad(model, forward_loss_fn)(model, batch())
    assert str(error.value) == "'Tiny' object has no attribute 'forward'"


def test_right_the_loss_receives_the_model_itself() -> None:
    """Even `mx.value_and_grad` converts nothing; only the gradients are a dict."""
    model = tiny_lora()
    seen: list[Any] = []

    def spy(arg: Any, x_BI: mx.array) -> mx.array:
        seen.append(arg)
        return loss_fn(arg, x_BI)

    _, grads = mx.value_and_grad(spy)(model, batch())
    assert seen[0] is model
    assert type(grads) is dict


def test_right_pass_the_model_and_call_it() -> None:
    """`nn.value_and_grad(model, loss_fn)(model, x)`, and `model(x)` in the loss."""
    model = tiny_lora()
    loss, grads = nn.value_and_grad(model, loss_fn)(model, batch())
    assert loss.item() == loss_fn(model, batch()).item()
    assert names(grads) == names(model.trainable_parameters())


def test_right_a_tree_goes_back_into_the_model_first() -> None:
    """Call `model.update(tree)` inside the loss, which is what `nn.value_and_grad` does."""
    model = tiny_lora()

    def loss_of_tree(tree: Any, x_BI: mx.array) -> mx.array:
        model.update(tree)
        return loss_fn(model, x_BI)

    _, by_hand = mx.value_and_grad(loss_of_tree)(model.trainable_parameters(), batch())
    _, grads = nn.value_and_grad(model, loss_fn)(model, batch())
    for ours, theirs in zip(arrays(by_hand), arrays(grads), strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))
