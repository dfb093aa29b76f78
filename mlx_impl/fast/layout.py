"""How the tokens of a batch are laid out: position ids, attention mask, and the positions to compute."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from . import ops
from .band import Band
from .unpadding import Unpadding


@dataclass(frozen=True)
class Layout:
    """What attention needs of a batch, and what a block may leave out."""

    position: int | mx.array = 0  # as in `ops.rope`
    mask_B1TS: mx.array | None = None  # as in `ops.attention`
    unpadding: Unpadding | None = None  # outside attention x_BTD is one row of the kept positions: (1, U, D)
    band: Band | None = None  # in place of a mask where it saves memory
    targets_N: mx.array | None = None  # in a last block: the positions in (B, T) needed after attention

    def split_heads(self, x_BTO: mx.array, H: int) -> mx.array:
        """(B, T, H * K) or (1, U, H * K) to (B, H, T, K)."""
        if self.unpadding:
            return self.unpadding.scatter(x_BTO, H)
        return mx.unflatten(x_BTO, -1, (H, -1)).swapaxes(1, 2)

    def merge_heads(self, x_BHTK: mx.array) -> mx.array:
        """(B, H, T, K) to (B, T, H * K) or (1, U, H * K)."""
        return self.unpadding.gather(x_BHTK) if self.unpadding else x_BHTK.swapaxes(1, 2).flatten(2)

    def select_targets(self, x_BTD: mx.array) -> mx.array:
        """In a last block (1, N, D), the positions with a target; else x as it is."""
        if self.targets_N is None:
            return x_BTD
        if self.unpadding:
            return self.unpadding.at(x_BTD, self.targets_N)
        return x_BTD.flatten(0, 1)[self.targets_N][None]

    def rope(self, x_BHTK: mx.array, frequency_P: tuple[float, ...]) -> mx.array:
        return ops.rope(x_BHTK, frequency_P, self.position)

    def attend(self, q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array) -> mx.array:
        if self.band:
            return self.band.attend(q_BHTK, k_BGSK, v_BGSK)
        return ops.attention(q_BHTK, k_BGSK, v_BGSK, self.mask_B1TS)
