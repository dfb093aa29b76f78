"""Filtering gradients by name is a worse, hand-made `freeze()`.

In PyTorch it is usual to select parameters by name. The plan takes gradients of everything and keeps
those with "lora_a" or "lora_b" in the path. But these substrings also match `lora_base` and
`lora_alpha`, they miss PEFT's `lora_A`, and anything done before the filter (a norm, say) includes
the frozen gradients. With `freeze()` and `nn.value_and_grad` there is nothing to filter.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from tests.traps.tiny_lora import LORA_NAMES, arrays, batch, loss_fn, names, pending_ops, tiny_lora


def filter_lora_gradients(grads: Any) -> Any:
    """The filter of the plan."""
    return tree_unflatten({k: v for k, v in tree_flatten(grads) if "lora_a" in k or "lora_b" in k})


class RenamedLoRA(nn.Module):
    """LoRA whose frozen linear is called `lora_base` and whose frozen scale is `lora_alpha`."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_base = nn.Linear(3, 5)
        self.lora_alpha = mx.array(2.0)
        self.freeze()
        self.lora_a = mx.random.normal((3, 2))
        self.lora_b = mx.full((2, 5), 0.1)

    def __call__(self, x_BI: mx.array) -> mx.array:
        return self.lora_base(x_BI) + self.lora_alpha * (x_BI @ self.lora_a @ self.lora_b)


def test_wrong_a_substring_admits_frozen_parameters() -> None:
    """`lora_base` contains "lora_b" and `lora_alpha` contains "lora_a", so both train although frozen."""
    model = RenamedLoRA()
    before = np.array(model.lora_base.weight)
    _, grads = mx.value_and_grad(loss_fn)(model, batch())
    kept = filter_lora_gradients(grads)
    assert {"lora_base.weight", "lora_base.bias", "lora_alpha"} < set(names(kept))
    optim.SGD(learning_rate=0.1).update(model, kept)
    assert np.all(np.array(model.lora_base.weight) != before)
    assert model.lora_alpha.item() != 2.0


def test_wrong_a_substring_misses_another_spelling() -> None:
    """PEFT writes `lora_A`, so the filter returns `[]`, which the optimizer cannot read."""
    model: Any = nn.Linear(3, 5)
    model.lora_A, model.lora_B = mx.ones((3, 2)), mx.ones((2, 5))
    kept = filter_lora_gradients(model.parameters())
    assert kept == []
    with pytest.raises(IndexError) as error:
        optim.AdamW(learning_rate=0.1).update(model, kept)
    assert str(error.value) == "list index out of range"


def test_wrong_zeros_in_place_of_a_filter_let_weight_decay_shrink_the_base() -> None:
    """AdamW multiplies a weight with zero gradient by 1 - learning rate * weight decay = 0.99."""
    model = tiny_lora()
    before = np.array(model.layers[0].linear.weight)
    _, grads = mx.value_and_grad(loss_fn)(model, batch())
    grads = tree_map_with_path(lambda k, g: g if "lora" in k else mx.zeros_like(g), grads)
    optimizer = optim.AdamW(learning_rate=0.1, weight_decay=0.1)
    optimizer.update(model, grads)
    after = np.array(model.layers[0].linear.weight)
    np.testing.assert_array_equal(after, before * (np.float32(1) - np.float32(0.1) * np.float32(0.1)))
    assert "layers.0.linear.weight.m" in names(optimizer.state)


def test_wrong_a_norm_taken_before_the_filter_counts_the_frozen_gradients() -> None:
    """With a limit of the LoRA gradients' own norm, they shrink, because the norm includes frozen ones."""
    model = tiny_lora()
    _, grads = mx.value_and_grad(loss_fn)(model, batch())
    _, lora_norm = optim.clip_grad_norm(filter_lora_gradients(grads), max_norm=1e9)
    clipped, all_norm = optim.clip_grad_norm(grads, max_norm=lora_norm.item())
    assert all_norm.item() > lora_norm.item()
    _, norm_left = optim.clip_grad_norm(filter_lora_gradients(clipped), max_norm=1e9)
    assert norm_left.item() < lora_norm.item()


def test_wrong_evaluating_before_the_filter_runs_the_frozen_gradients() -> None:
    """`mx.eval` of all gradients runs more operations than the LoRA gradients need."""
    model = tiny_lora()
    _, grads = mx.value_and_grad(loss_fn)(model, batch())
    lora_grads = filter_lora_gradients(grads)
    assert pending_ops(*arrays(grads)) > pending_ops(*arrays(lora_grads))
    mx.eval(grads)
    assert pending_ops(*arrays(lora_grads)) == 0


def test_right_freeze_needs_no_filter() -> None:
    """The trainable parameters are those not frozen, whatever their names are."""
    model = RenamedLoRA()
    _, grads = nn.value_and_grad(model, loss_fn)(model, batch())
    assert names(grads) == ["lora_a", "lora_b"]


def test_right_the_optimizer_holds_state_for_the_trainable_only() -> None:
    """Two moments for each LoRA matrix, the step and the learning rate, and nothing else."""
    model = tiny_lora()
    optimizer = optim.AdamW(learning_rate=0.1)
    _, grads = nn.value_and_grad(model, loss_fn)(model, batch())
    optimizer.update(model, grads)
    moments = [f"{name}.{moment}" for name in LORA_NAMES for moment in ("m", "v")]
    assert sorted(names(optimizer.state)) == sorted([*moments, "step", "learning_rate"])


def test_right_gradients_filtered_and_never_evaluated_cost_no_arithmetic() -> None:
    """MLX is lazy: gradients that the filter drops are never computed."""
    model = tiny_lora()
    _, every = mx.value_and_grad(loss_fn)(model, batch())
    _, lora_only = nn.value_and_grad(model, loss_fn)(model, batch())
    assert pending_ops(*arrays(filter_lora_gradients(every))) == pending_ops(*arrays(lora_only))
