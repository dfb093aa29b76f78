"""Freeze before LoRA is added, and after everything else has been built.

In PyTorch one sets `requires_grad` on each parameter at the end. In MLX, `freeze()` freezes what is
there when it is called. After LoRA injection it freezes LoRA too. Whatever is built after it is
trainable: LoRA, as intended, but also a base layer that is rebuilt by the injection or by
`nn.quantize`. The right order is load, quantize, `freeze()`, inject; then check which names are
trainable.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.traps.tiny_lora import LORA_NAMES, LoRALinear, Tiny, batch, loss_fn, names, tiny_lora


def test_wrong_freezing_after_injection_leaves_nothing_trainable() -> None:
    """The LoRA matrices are frozen too, so there is nothing to differentiate."""
    model = Tiny()
    model.layers = [LoRALinear(layer) for layer in model.layers]
    model.freeze()
    assert names(model.trainable_parameters()) == []
    with pytest.raises(ValueError) as error:
        nn.value_and_grad(model, loss_fn)(model, batch())
    assert str(error.value) == "[grad] Must specify at least one argument."


def test_wrong_a_base_layer_made_after_the_freeze_is_trainable() -> None:
    """A new linear layer with the weights of a frozen one is not frozen."""
    model = Tiny()
    model.freeze()
    for i, old in enumerate(model.layers):
        new = nn.Linear(3, 5)
        new.weight, new.bias = old.weight, old.bias
        model.layers[i] = LoRALinear(new)
    assert len(names(model.trainable_parameters())) == 8
    assert "layers.0.linear.weight" in names(model.trainable_parameters())


def test_wrong_quantizing_after_the_freeze_thaws_the_biases() -> None:
    """`nn.quantize` builds new layers; their packed weights and scales are frozen, but the bias is not."""
    model = nn.Sequential(nn.Linear(64, 32))
    model.freeze()
    nn.quantize(model, group_size=32, bits=4)
    assert names(model.trainable_parameters()) == ["layers.0.bias"]


def test_wrong_unfreezing_a_misspelled_name_is_silent() -> None:
    """`unfreeze(keys=...)` ignores a name that no layer has."""
    model = tiny_lora().freeze()
    model.unfreeze(keys=["lora_A", "lora_B"])
    assert names(model.trainable_parameters()) == []


def test_right_freeze_then_inject_around_the_same_layer() -> None:
    """LoRA is added after the freeze and wraps the frozen layer itself, so only LoRA is trainable."""
    model = Tiny()
    model.freeze()
    model.layers = [LoRALinear(layer) for layer in model.layers]
    assert sorted(names(model.trainable_parameters())) == LORA_NAMES


def test_right_quantize_then_freeze() -> None:
    """With `freeze()` last, a quantized layer has nothing trainable."""
    model = nn.Sequential(nn.Linear(64, 32))
    nn.quantize(model, group_size=32, bits=4)
    model.freeze()
    assert names(model.trainable_parameters()) == []


def test_right_strict_unfreeze_names_the_missing_key() -> None:
    """With `strict=True` the misspelled name raises."""
    with pytest.raises(KeyError) as error:
        tiny_lora().freeze().unfreeze(keys=["lora_A"], strict=True)
    assert error.value.args[0] == "Module doesn't contain member lora_A."


def test_right_an_array_assigned_after_the_freeze_is_trainable() -> None:
    """`freeze()` freezes names: a new name is trainable, a new array under a frozen name is not."""
    layer: Any = nn.Linear(3, 5).freeze()
    layer.lora_a = mx.ones((3, 2))
    layer.weight = mx.ones((5, 3))
    assert names(layer.trainable_parameters()) == ["lora_a"]
