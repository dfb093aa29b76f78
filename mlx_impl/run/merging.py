"""Merge the adapter into the base weights, and unmerge it.

A merged linear costs as much as one without an adapter. Its weight is W + dW rounded to the weight's type;
how much of the update the rounding loses is reported. Unmerging restores every bit: the base was kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..files.quantized import plain_module
from ..lora import LoRALinear, dense_weight_OI, lora_layers
from ..model import CausalLM


@dataclass(frozen=True)
class Merged:
    """What `merge` took out of the model, and what the rounding did to it."""

    layers: dict[str, LoRALinear]
    plain: dict[str, nn.Module]  # the merged linears in their place
    rounding: float  # |(W' - W) - dW| / |dW|, Frobenius norms over all layers


def merge(model: CausalLM) -> Merged:
    """Replace every adapted linear by a plain one of weight W' = W + dW, formed in float32, never quantized.

    Raises ValueError when there is no adapter, or when a merged weight is not finite.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("a model must carry an adapter to be merged, got one without")
    plain: dict[str, nn.Module] = {}
    lost, whole = mx.array(0.0), mx.array(0.0)
    for name, layer in layers.items():
        weight_OI = dense_weight_OI(layer.linear).astype(mx.float32)
        delta_OI = layer.delta_OI().astype(mx.float32)
        merged_OI = (weight_OI + delta_OI).astype(dense_weight_OI(layer.linear).dtype)
        if not mx.isfinite(merged_OI).all():
            raise ValueError(f"a merged weight must be finite, and that of {name} is not")
        lost += mx.square(merged_OI.astype(mx.float32) - weight_OI - delta_OI).sum()
        whole += mx.square(delta_OI).sum()
        plain[name] = plain_module(layer.linear, merged_OI)
        plain[name].freeze()
    model.update_modules(tree_unflatten(list(plain.items())))
    return Merged(layers, plain, (lost / whole).item() ** 0.5 if whole.item() else 0.0)


def unmerge(model: CausalLM, merged: Merged) -> None:
    """Put the adapted linears back; ValueError unless this is the model they were taken out of."""
    modules = dict(model.named_modules())
    for name, linear in merged.plain.items():
        if modules.get(name) is not linear:
            raise ValueError(f"only the model that was merged can be unmerged, and {name} is another")
    model.update_modules(tree_unflatten(list(merged.layers.items())))
    model.train(model.training)  # they may have missed a change of mode
