"""The bugs of loss, gradient and freezing that signatures must name, beside those of signature_bugs.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_impl import ops
from mlx_impl.lora import DoRALinear, lora_layers
from mlx_impl.optim import LoRAOptimizer
from tests.trainers.mutants.gradient import begun, nats_of_gradient
from tests.trainers.mutants.loss import masks
from tests.trainers.mutants.mutant import SHIPPED, Mutant, Patches
from tests.trainers.mutants.ops import op
from tests.trainers.signature_bugs import bug, gradients, of_nats, times

stop = mx.stop_gradient
right_attention, right_call, right_update = ops.attention, DoRALinear.__call__, LoRAOptimizer.update


# Of the loss.


def two_padding_targets(mask_BT: np.ndarray) -> np.ndarray:
    """Also the two positions after the last target of a row, where there are such."""
    places_T = np.arange(mask_BT.shape[1])
    last_B1 = np.where(mask_BT, places_T, -9).max(axis=1, keepdims=True)
    return mask_BT | ((places_T > last_B1) & (places_T <= last_B1 + 2))


def smoothed(nats: mx.array, count: mx.array, arrays: Any) -> tuple[mx.array, mx.array]:
    """0.9 of the target's nats, and 0.1 of the mean over all words."""
    logits_BTV, _, mask_BT = arrays
    all_BT = mx.logsumexp(logits_BTV, axis=-1) - logits_BTV.mean(axis=-1)
    return 0.9 * nats + 0.1 * mx.where(mask_BT, all_BT, 0).sum(), count


# Of the gradient.


def through_factors(change: Callable[[mx.array, float], mx.array], *names: str) -> Patches:
    """The right update, by factors whose gradient is another."""

    def update_BTO(self: Any, x_BTI: mx.array) -> mx.array:
        a_IR, b_RO = (
            change(self[name], self.scale) if name in names else self[name] for name in ("lora_a", "lora_b")
        )
        return self.dropout(x_BTI) @ a_IR @ b_RO

    return {"mlx_impl.lora.LoRALinear.update_BTO": update_BTO}


def unscaled(factor: mx.array, scale: float) -> mx.array:
    """Its gradient lacks the scale, by which the layer multiplies."""
    return stop(factor) + (factor - stop(factor)) / scale


def with_constant_magnitude(self: Any, x_BTI: mx.array) -> mx.array:
    magnitude = self.magnitude
    self.magnitude = stop(magnitude)
    try:
        return right_call(self, x_BTI)
    finally:
        self.magnitude = magnitude


def lost_where(is_lost: Callable[[str], bool]) -> Patches:
    return gradients(lambda grads, _: {n: mx.zeros(x.shape) if is_lost(n) else x for n, x in grads.items()})


def learned_by_the_last_row(nats: mx.array, count: mx.array, arrays: Any) -> tuple[mx.array, mx.array]:
    logits_BTV, targets_BT, mask_BT = (array[-1:] for array in arrays)
    target_BT = mx.take_along_axis(logits_BTV, targets_BT[..., None], -1).squeeze(-1)
    of_last = mx.where(mask_BT, mx.logsumexp(logits_BTV, axis=-1) - target_BT, 0).sum()
    return stop(nats) + of_last - stop(of_last), count


def constant_root(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return weight * x * stop(mx.rsqrt(mx.square(x).mean(-1, keepdims=True) + eps))


# Of what is trained.


def unfrozen(of_model: Callable[[Any], list[Any]], **chosen: Any) -> Patches:
    def unfreeze(model: Any) -> None:
        for module in of_model(model):
            module.unfreeze(recurse=False, **chosen)

    return begun(unfreeze)


def adapted(model: Any) -> list[Any]:
    return [layer.linear for layer in lora_layers(model).values()]


def untrained(kind: str) -> Patches:
    def update(self: Any, model: Any, grads: Any) -> None:
        before = [(n, x) for n, x in tree_flatten(model.trainable_parameters()) if n.endswith(kind)]
        right_update(self, model, grads)
        model.update(tree_unflatten(before))

    return {"mlx_impl.optim.LoRAOptimizer.update": update}


# Signature -> a bug of its kind.
OF_GRADIENTS: dict[str, Mutant] = dict(
    [
        bug("pad targets 2", masks(two_padding_targets), SHIPPED),
        bug("count of tokens", of_nats(lambda nats, _, arrays: (nats, (arrays[1] != 0).sum()))),
        bug("label smoothing", of_nats(smoothed)),
        bug("gradient over tokens", times(lambda batch: int(batch.mask_BT.sum()) / batch.num_tokens)),
        bug("gradient halved", nats_of_gradient(0.5), SHIPPED),
        bug("gradient negated", nats_of_gradient(-1.0), SHIPPED),
        bug("no gradient of lora_a", through_factors(lambda factor, _: stop(factor), "lora_a")),
        bug("no gradient of magnitude", {"mlx_impl.lora.DoRALinear.__call__": with_constant_magnitude}),
        bug("no gradient of attention", lost_where(lambda name: ".self_attn." in name)),
        bug("no gradient of the feed-forward", lost_where(lambda name: ".mlp." in name)),
        bug("no gradient of layer 0", lost_where(lambda name: "layers.0." in name)),
        bug("no gradient of layer 1", lost_where(lambda name: "layers.1." in name)),
        bug("scale forgotten in dB", through_factors(unscaled, "lora_b")),
        bug("scale forgotten in both", through_factors(unscaled, "lora_a", "lora_b")),
        bug("gradient of the last row", of_nats(learned_by_the_last_row)),
        bug("norm detached", op("rms_norm", constant_root)),
        bug("scores detached", op("attention", lambda q, k, v, m: right_attention(stop(q), stop(k), v, m))),
        bug("head trained", unfrozen(lambda model: [model.lm_head])),
        bug("embedding and head trained", unfrozen(lambda model: [model.lm_head, model.model.embed_tokens])),
        bug("adapted weights trained", unfrozen(adapted, keys="weight")),
        bug("adapted linears trained", unfrozen(adapted)),
        bug("B not trained", untrained("lora_b")),
        bug("DoRA's magnitude not trained", untrained("magnitude")),
    ]
)
