"""Merging: what rounding costs is measured, and what is taken out again is the old model to the bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig
from mlx_impl.lora import add_lora, lora_layers, lora_parameters
from mlx_impl.model import CausalLM
from mlx_impl.run.merging import merge, unmerge
from mlx_impl.run.state import digest_of_base
from tests.lora_ladder.cases import SPEC


def adapted(lora: LoRAConfig, dtype: mx.Dtype = mx.float32) -> CausalLM:
    """A random model in this type with an adapter in float32, whose B is small but not zero."""
    mx.random.seed(1)
    model = CausalLM(SPEC)
    model.set_dtype(dtype)
    add_lora(model, lora)
    rng = np.random.default_rng(2)
    given = {n: a for n, a in lora_parameters(model).items() if n.endswith("lora_b")}
    model.load_weights(
        [(n, mx.array(0.01 * rng.standard_normal(a.shape), mx.float32)) for n, a in given.items()],
        strict=False,
    )
    return model


def lost_by_hand(model: CausalLM, dtype: mx.Dtype) -> float:
    """In float64, layer by layer: how far what was added is from what should have been."""
    lost, whole = 0.0, 0.0
    for layer in lora_layers(model).values():
        weight = np.array(layer.linear.weight.astype(mx.float32), np.float64)
        delta = layer.scale * (np.array(layer.lora_a, np.float64) @ np.array(layer.lora_b, np.float64)).T
        merged = np.array(mx.array(weight + delta, mx.float32).astype(dtype).astype(mx.float32), np.float64)
        lost += np.sum((merged - weight - delta) ** 2)
        whole += np.sum(delta**2)
    return float(np.sqrt(lost / whole))


@pytest.mark.parametrize(("dtype", "least", "most"), [(mx.float32, 1e-8, 1e-5), (mx.bfloat16, 0.01, 1.0)])
def test_the_rounding_reported_is_that_of_float64_by_hand(dtype: mx.Dtype, least: float, most: float) -> None:
    """Little in float32; in bfloat16 a good part of a small update."""
    model = adapted(LoRAConfig(rank=3, alpha=7.0), dtype)
    expected = lost_by_hand(model, dtype)
    rounding = merge(model).rounding
    assert least < rounding < most
    assert rounding == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_unmerged_the_model_is_what_it_was_to_the_bit(dtype: mx.Dtype) -> None:
    model = adapted(LoRAConfig(rank=3, use_dora=True), dtype)
    before, digest = dict(tree_flatten(model.parameters())), digest_of_base(model)
    merged = merge(model)
    assert digest_of_base(model) != digest
    assert [n for n, _ in tree_flatten(model.trainable_parameters())] == []
    unmerge(model, merged)
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], before[name]) for name in before)
    assert digest_of_base(model) == digest


def test_only_the_model_that_was_merged_can_be_unmerged() -> None:
    one, other = adapted(LoRAConfig(rank=3)), adapted(LoRAConfig(rank=3))
    merged = merge(one)
    merge(other)
    with pytest.raises(ValueError, match="only the model that was merged can be unmerged"):
        unmerge(other, merged)


def test_unmerged_layers_are_in_the_mode_that_the_model_is_in() -> None:
    model = adapted(LoRAConfig(rank=3, dropout=0.5))
    merged = merge(model)
    model.eval()
    unmerge(model, merged)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), model(tokens))


def test_a_model_without_an_adapter_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="must carry an adapter to be merged"):
        merge(CausalLM(SPEC))


def test_a_merged_weight_that_is_not_finite_is_refused_and_the_model_left_alone() -> None:
    model = adapted(LoRAConfig(rank=3))
    name = "model.layers.1.mlp.up_proj.lora_b"
    model.load_weights([(name, mx.full(lora_parameters(model)[name].shape, float("inf")))], strict=False)
    with pytest.raises(
        ValueError, match=r"must be finite, and that of model\.layers\.1\.mlp\.up_proj is not"
    ):
        merge(model)
    assert name in lora_parameters(model)
