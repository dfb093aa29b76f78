"""Rung 11: bugs that the batches and factors of the lower rungs do not meet, because of their numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_impl.data import Batch
from mlx_impl.fast.forward import FAST
from mlx_impl.fast.kept_positions import KeptPositions, kept_positions
from mlx_impl.lora import LoRALinear
from mlx_impl.targets import rank_and_scale
from tests.trainers.mutants.mutant import Mutant, Patches

TILE, LARGEST_SCALE, GROUP, FILLER = 8, 8.0, 4, 1


def prepared(change: Any) -> Patches:
    """Batches are changed on their way to the arrays of a step."""
    to_arrays = FAST.to_arrays
    return {"mlx_impl.run.trainer.FAST": FAST._replace(to_arrays=lambda batch: to_arrays(change(batch)))}


def not_computed_at_token_0(batch: Batch, is_packed: bool) -> KeptPositions | None:
    kept = kept_positions(batch, is_packed)
    if kept is None:
        return None
    dummy = int(kept.is_needed_U.sum())
    return kept._replace(source_BT=np.where(batch.inputs_BT == 0, dummy, kept.source_BT).astype(np.int32))


def without_the_last_group(batch: Batch) -> Batch:
    rows = len(batch.mask_BT)
    if rows <= GROUP:
        return batch
    return batch._replace(mask_BT=batch.mask_BT & (np.arange(rows) < rows - rows % GROUP)[:, None])


def update_of_a_tile(self: LoRALinear, x_BTI: mx.array) -> mx.array:
    a_IR, b_RO = self.lora_a[:, :TILE].astype(x_BTI.dtype), self.lora_b[:TILE].astype(x_BTI.dtype)
    return (self.dropout(x_BTI) @ a_IR) @ b_RO


def update_of_what_is_not_zero(self: LoRALinear, x_BTI: mx.array) -> mx.array:
    """scale is alpha / rank, so this is alpha / (the number of rows of B that are not zero)."""
    a_IR, b_RO = self.lora_a.astype(x_BTI.dtype), self.lora_b.astype(x_BTI.dtype)
    used = mx.maximum((mx.stop_gradient(b_RO) != 0).any(axis=1).sum(), 1)
    return (len(b_RO) / used).astype(x_BTI.dtype) * ((self.dropout(x_BTI) @ a_IR) @ b_RO)


def at_most_eight(name: str, config: Any) -> tuple[int, float]:
    rank, scale = rank_and_scale(name, config)
    return rank, min(scale, LARGEST_SCALE)


MUTANTS = [
    Mutant(
        "token-zero-not-computed",
        11,
        "Padding is recognized by the input token 0: a real token 0 is attended as if it were padding.",
        {"mlx_impl.fast.kept_positions.kept_positions": not_computed_at_token_0},
    ),
    Mutant(
        "token-zero-replaced",
        11,
        "Padding is filled with another token wherever the input is 0, also where a real token is 0.",
        prepared(
            lambda batch: batch._replace(inputs_BT=np.where(batch.inputs_BT == 0, FILLER, batch.inputs_BT))
        ),
    ),
    Mutant(
        "rows-in-groups-of-four",
        11,
        "More than four rows are computed four at a time, and an incomplete last group is left out.",
        prepared(without_the_last_group),
    ),
    Mutant(
        "rank-beyond-a-tile",
        11,
        "A kernel's tile has room for a rank of 8, and the rest of a larger rank is not multiplied.",
        {"mlx_impl.lora.LoRALinear.update_BTO": update_of_a_tile},
    ),
    Mutant(
        "scale-by-the-rank-in-use",
        11,
        "alpha is divided by the number of rows of B that are not zero, as if the rank were what is in use.",
        {"mlx_impl.lora.LoRALinear.update_BTO": update_of_what_is_not_zero},
    ),
    Mutant(
        "scale-cut-to-eight",
        11,
        "A scale above 8 is cut to 8, as a guard against divergence.",
        {"mlx_impl.targets.rank_and_scale": at_most_eight},
    ),
]
