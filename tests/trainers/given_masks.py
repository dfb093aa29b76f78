"""Dropout with given masks, for both paths of `mlx_impl`.

A mask covers all positions of (B, T). Where the fast path computes only some positions, the mask is gathered
at those: the target positions after attention in the last block, and the kept positions elsewhere. Of packed
rows it first lays the examples out as rows of their own (`fast/segments.py`), and so are the masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_impl.data import Batch
from mlx_impl.fast.segments import examples_of, places, sub_batches_in
from mlx_impl.lora import Dropout, lora_layers
from mlx_impl.model import CausalLM
from mlx_impl.train import PLAIN, Arrays, Loss, Nats
from tests.lora_ladder.protocol import Arrays as Named

AFTER_ATTENTION = ("o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Computed:
    """The positions in the flattened (B, T) that the current batch computes; None: all of them."""

    kept_S: mx.array | None = None
    positions_N: mx.array | None = None
    place_M: mx.array | None = None  # of packed rows laid out anew: where each position was


class GivenDropout(Dropout):
    def __init__(self, p: float, keep_BTI: np.ndarray, computed: Computed, is_at_targets: bool) -> None:
        super().__init__(p)
        self.keep_BTI = mx.array(keep_BTI)
        self.freeze()
        self._computed, self._is_at_targets = computed, is_at_targets

    def __call__(self, x_BTI: mx.array) -> mx.array:
        if not self.training:
            return x_BTI
        keep_BTI, computed = self.keep_BTI, self._computed  # (1, 1, I) where all positions have one mask
        positions = computed.positions_N if self._is_at_targets else computed.kept_S
        for chosen in (computed.place_M, positions):
            if chosen is not None:
                keep_BTI = keep_BTI.flatten(0, 1)[chosen].reshape(1, len(chosen), -1)
        if keep_BTI.size == x_BTI.size:
            keep_BTI = keep_BTI.reshape(x_BTI.shape)
        return x_BTI * keep_BTI / (1 - self.p)


def places_of(batch: Batch) -> np.ndarray:
    """Where in the flattened (B, T) each position of `segments.examples_apart` was."""
    return places(*examples_of(batch), sub_batches_in(batch))[0]


def with_given_masks(model: CausalLM, masks: Named, loss: Loss) -> Loss:
    """Replaces the model's dropout by these masks; the returned loss tells them its positions."""
    is_plain = loss.batch_loss is PLAIN.batch_loss  # a copy of PLAIN is plain too
    computed, last = Computed(), f"layers.{len(model.model.layers) - 1}."
    for name, layer in lora_layers(model).items():
        is_at_targets = last in name and name.endswith(AFTER_ATTENTION)
        layer.dropout = GivenDropout(layer.dropout.p, masks[name], computed, is_at_targets)

    def to_arrays(batch: Batch) -> Arrays:
        is_laid_out = not is_plain and batch.segment_BT is not None
        computed.place_M = mx.array(places_of(batch)) if is_laid_out else None
        return loss.to_arrays(batch)

    def batch_loss(model: CausalLM, arrays: Arrays) -> Nats:
        if not is_plain:
            _, computed.positions_N, _, _, _, kept = arrays
            computed.kept_S = kept[0] if kept else None
        return loss.batch_loss(model, arrays)

    return loss._replace(to_arrays=to_arrays, batch_loss=batch_loss)
