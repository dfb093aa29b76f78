"""`a += b` and `a[0] = b` change the array for every name that refers to it; `a = a + b` for none but `a`.

An MLX operation never changes its inputs, and there is no `p.data`, `p.add_` or `p.copy_`. The two statements
are the exception: they give the Python object `a` a new value, and whatever refers to this object sees it.
PyTorch does the same, but a training loop that writes `p -= rate * g` meets four differences:

* `nn.value_and_grad` leaves new objects in the model. Parameters that were listed before it, as PyTorch's
  optimizers do, are no longer the model's, and changing them trains nothing.
* Those listed after it are, and a snapshot of them moves too; beside `optimizer.update` it would not.
* A slice is a copy, where PyTorch has a view: `row = w[0]; row += 1` leaves `w` as it was.
* The type may change: a bfloat16 parameter minus a float32 number becomes float32. PyTorch keeps the type.

The right form is `optimizer.update(model, grads)`, or `model.update` with new arrays.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map

from tests.traps.tiny_lora import Tiny, arrays, batch, loss_fn, tiny_lora

RATE = 0.5


def gradients(model: Tiny) -> dict:
    return nn.value_and_grad(model, loss_fn)(model, batch())[1]


def numbers(tree: object) -> list:
    return [array.tolist() for array in arrays(tree)]


@pytest.mark.parametrize("name", ["data", "add_", "sub_", "copy_", "zero_", "grad"])
def test_wrong_an_array_has_none_of_pytorchs_members(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"'array' object has no attribute '{name}'"):
        getattr(mx.zeros(2), name)


def test_wrong_binding_a_name_trains_nothing() -> None:
    model = tiny_lora()
    before = numbers(model.parameters())
    grads = dict(tree_flatten(gradients(model)))
    for name, p in tree_flatten(model.trainable_parameters()):
        p = p - RATE * grads[name]
        assert mx.any(grads[name] != 0)
    assert numbers(model.parameters()) == before


def test_wrong_parameters_listed_before_value_and_grad_are_no_longer_the_models() -> None:
    model = tiny_lora()
    before, listed = numbers(model.parameters()), tree_flatten(model.trainable_parameters())
    grads = dict(tree_flatten(gradients(model)))
    for name, p in listed:
        p -= RATE * grads[name]
    assert numbers(model.parameters()) == before


def test_wrong_a_snapshot_moves_with_what_is_changed_in_place() -> None:
    """Listed after it they are the model's, which does train; and they are the snapshot's."""
    model = tiny_lora()
    grads = dict(tree_flatten(gradients(model)))
    snapshot, before = model.trainable_parameters(), numbers(model.trainable_parameters())
    for name, p in tree_flatten(model.trainable_parameters()):
        p -= RATE * grads[name]
    assert numbers(model.trainable_parameters()) == numbers(snapshot) != before


def test_wrong_every_name_sees_an_item_that_is_assigned() -> None:
    a = mx.zeros(2)
    alias, copy = a, mx.array(a)
    a[0] = 1
    assert alias.tolist() == [1, 0] and copy.tolist() == [0, 0]


def test_wrong_a_sum_that_begins_as_the_first_gradient_changes_it() -> None:
    first, second = mx.array([1.0]), mx.array([5.0])
    total = first
    total += second
    assert first.item() == 6


def test_wrong_a_change_within_the_loss_stays_in_the_model() -> None:
    """The gradient is right for the changed weight, and the next step begins with it."""
    model = tiny_lora()
    before = model.layers[0].lora_b.tolist()

    def changing_loss(model: Tiny, x_BI: mx.array) -> mx.array:
        b_RO = model.layers[0].lora_b
        b_RO += 1
        return loss_fn(model, x_BI)

    nn.value_and_grad(model, changing_loss)(model, batch())
    assert mx.array_equal(model.layers[0].lora_b, mx.array(before) + 1)


def test_wrong_a_slice_is_no_view() -> None:
    w = mx.zeros((2, 3))
    for part in (w[0], w[:, 1:], w.T, w.reshape(6), w.flatten()):
        part += 1
    assert not w.any()


def test_wrong_a_change_in_place_changes_the_type() -> None:
    """And so for every name; an assignment to items keeps it."""
    p = mx.ones(2, mx.bfloat16)
    parameter = p
    p -= mx.array(0.25)
    assert parameter.dtype == mx.float32
    q = mx.ones(2, mx.bfloat16)
    q[:] = mx.array(0.25)
    assert q.dtype == mx.bfloat16


def test_right_items_of_the_array_itself() -> None:
    w = mx.zeros((2, 3))
    w[0] += 1
    assert w.tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("by_optimizer", [True, False])
def test_right_an_update_puts_new_arrays_in_place_of_the_old(by_optimizer: bool) -> None:
    """The snapshot stays as it was, at no cost: it is how a training loop can go back."""
    model = tiny_lora()
    snapshot, before = model.trainable_parameters(), numbers(model.trainable_parameters())
    grads = gradients(model)
    if by_optimizer:
        optim.SGD(RATE).update(model, grads)
    else:
        model.update(tree_map(lambda p, grad: p - RATE * grad, model.trainable_parameters(), grads))
    assert numbers(snapshot) == before != numbers(model.trainable_parameters())
    model.update(snapshot)
    assert numbers(model.trainable_parameters()) == before


def test_right_a_sum_of_new_arrays() -> None:
    first, second = mx.array([1.0]), mx.array([5.0])
    total = first + second
    assert (first.item(), total.item()) == (1, 6)
