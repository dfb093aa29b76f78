"""How the tokens of a batch are laid out: rows, or sub-batches of rows; masks; positions to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import mlx.core as mx

from ..model import attention_mask
from . import ops
from .band import Band, band_of
from .band import pays as band_pays
from .segments import SubBatch
from .unpadding import Unpadding

Mask = Band | mx.array | None  # None: causal; an array: mask_11TS


@dataclass(frozen=True)
class Layout:
    """What attention needs of a batch, and what a block may leave out."""

    masks: Mapping[int, Mask] = field(default_factory=dict)  # of rows of each width
    unpadding: Unpadding | None = None  # outside attention x_BTD is one row of the kept positions: (1, U, D)
    sub_batches: Sequence[SubBatch] = ()  # whose rows the (1, T) of a batch holds one after the other
    targets_N: mx.array | None = None  # in the last block: positions in (B, T) with a target

    def split_heads(self, x_BTO: mx.array, H: int) -> mx.array:
        """(B, T, H * K) or (1, U, H * K) to (B, H, T, K)."""
        if self.unpadding:
            return self.unpadding.scatter(x_BTO, H)
        return mx.unflatten(x_BTO, -1, (H, -1)).swapaxes(1, 2)

    def merge_heads(self, x_BHTK: mx.array) -> mx.array:
        """(B, H, T, K) to (B, T, H * K) or (1, U, H * K)."""
        return self.unpadding.gather(x_BHTK) if self.unpadding else x_BHTK.swapaxes(1, 2).flatten(2)

    def select_targets(self, x_BTD: mx.array) -> mx.array:
        """In the last block (1, N, D), the positions with a target; else x as it is."""
        if self.targets_N is None:
            return x_BTD
        if self.unpadding:
            return self.unpadding.at(x_BTD, self.targets_N)
        return x_BTD.flatten(0, 1)[self.targets_N][None]

    def attend(
        self, q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array, frequency_P: tuple[float, ...]
    ) -> mx.array:
        """RoPE and attention of each row, (B, H, T, K)."""
        if not self.sub_batches:
            return self.attend_rows(q_BHTK, k_BGTK, v_BGTK, frequency_P)
        queries, keys, values = (rows_of(x, self.sub_batches) for x in (q_BHTK, k_BGTK, v_BGTK))
        parts = zip(queries, keys, values, strict=True)
        mixes = [self.attend_rows(q, k, v, frequency_P).swapaxes(0, 1).flatten(1, 2) for q, k, v in parts]
        return mx.concatenate(mixes, axis=1)[None]

    def attend_rows(
        self, q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array, frequency_P: tuple[float, ...]
    ) -> mx.array:
        q_BHTK, k_BGTK = self.rope(q_BHTK, frequency_P), self.rope(k_BGTK, frequency_P)
        mask = self.masks[q_BHTK.shape[2]]
        if isinstance(mask, Band):
            return mask.attend(q_BHTK, k_BGTK, v_BGTK)
        return ops.attention(q_BHTK, k_BGTK, v_BGTK, mask)

    def rope(self, x_BHTK: mx.array, frequency_P: tuple[float, ...]) -> mx.array:
        return ops.rope(x_BHTK, frequency_P, 0)


def masks_of(T: int, sub_batches: Sequence[SubBatch], window: int | None) -> dict[int, Mask]:
    """The mask of rows of each width."""
    return {width: mask_of(width, window) for width in {width for _, width in sub_batches} or {T}}


def mask_of(width: int, window: int | None) -> Mask:
    if window is not None and band_pays(width, window):
        return band_of(width, window)
    return attention_mask(width, 0, window, None)


def rows_of(x_1HTK: mx.array, sub_batches: Sequence[SubBatch]) -> list[mx.array]:
    """(R, H, W, K) of each sub-batch."""
    *ends, _ = accumulate(rows * width for rows, width in sub_batches)
    parts = mx.split(x_1HTK[0], ends, axis=1)
    return [mx.unflatten(x, 1, tuple(of)).swapaxes(0, 1) for x, of in zip(parts, sub_batches, strict=True)]
