"""Which tokens a token sees, and where it stands: the past, of a sliding window, of its own packed example.

Sources: Beltagy et al. 2020, "Longformer", section 3.1, as Mistral has it (a token sees itself and the
window - 1 before it); Krell et al. 2021, "Efficient Sequence Packing", section 3.2 (block-diagonal attention,
positions that start again). No twin in reference/, which is handed one example a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .. import ops
from .slots import Slots


@dataclass(frozen=True)
class View:
    """How a forward pass looks at its tokens; without mask and positions: at the whole past."""

    offset: int = 0  # tokens seen before, in the cache
    position_BT: mx.array | None = None  # of each token in its own example, where rows are packed
    mask_B1TS: mx.array | None = None  # whether query t sees key s, where that is not just the past
    slots: Slots | None = None  # what is computed outside of attention, where that is not every slot
    wanted_N: mx.array | None = None  # of a last block: positions in (B, T) needed after attention

    def split_heads(self, x_BTO: mx.array, H: int) -> mx.array:
        """(B, T, H * K) to (B, H, T, K), what was left out put back."""
        if self.slots:
            return self.slots.spread(x_BTO, H)
        return mx.unflatten(x_BTO, -1, (H, -1)).swapaxes(1, 2)

    def merge_heads(self, x_BHTK: mx.array) -> mx.array:
        """(B, H, T, K) to (B, T, H * K), what is not kept left out."""
        return self.slots.gather(x_BHTK) if self.slots else x_BHTK.swapaxes(1, 2).flatten(2)

    def wanted(self, x_BTD: mx.array) -> mx.array:
        """Those tokens, as one row: (1, N, D)."""
        if self.wanted_N is None:
            return x_BTD
        return self.slots.at(x_BTD, self.wanted_N) if self.slots else x_BTD.flatten(0, 1)[self.wanted_N][None]

    def turn(self, x_BHTK: mx.array, frequency_P: tuple[float, ...]) -> mx.array:
        if self.position_BT is None:
            return ops.rope(x_BHTK, frequency_P, self.offset)
        return ops.rope_at(x_BHTK, frequency_P, self.position_BT)

    def attend(self, q_BHTK: mx.array, k_BGSK: mx.array, v_BGSK: mx.array) -> mx.array:
        if self.mask_B1TS is None:
            return ops.attention(q_BHTK, k_BGSK, v_BGSK)
        return ops.masked_attention(q_BHTK, k_BGSK, v_BGSK, self.mask_B1TS)


def view_of(T: int, offset: int, window: int | None, segment_BT: mx.array | None) -> View:
    """The view of T tokens after `offset` seen ones.

    `segment_BT` says which example of its row a token belongs to; neighbours of one number are one example.
    Packed rows cannot be read after a cache.
    """
    S = offset + T
    if segment_BT is None and (window is None or window >= S):
        return View(offset)
    key_S, query_T1 = mx.arange(S), mx.arange(offset, S)[:, None]
    mask_TS = key_S <= query_T1
    if window is not None:
        mask_TS = mask_TS & (query_T1 - key_S < window)
    if segment_BT is None:
        return View(offset, mask_B1TS=mask_TS[None, None])
    is_same_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    return View(0, positions(segment_BT), (mask_TS & is_same_BTS)[:, None])


def positions(segment_BT: mx.array) -> mx.array:
    """Of each token, how many of its own example stand before it."""
    time_T = mx.arange(segment_BT.shape[1])
    is_first_BT = mx.concatenate(
        [mx.ones_like(segment_BT[:, :1]) == 1, segment_BT[:, 1:] != segment_BT[:, :-1]], axis=1
    )
    return time_T - mx.cummax(mx.where(is_first_BT, time_T, 0), axis=1)
