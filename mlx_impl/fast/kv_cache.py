"""A KV cache that grows by 256 tokens at a time: a token is written in place, and only growing copies it.

The pattern's `generate.KeyValueCache` copies all keys and values for every token.
"""

from __future__ import annotations

import mlx.core as mx

GROWTH = 256  # tokens


def room_for(num_tokens: int) -> int:
    """The tokens that a cache has room for once it holds so many: a multiple of GROWTH."""
    return -(-num_tokens // GROWTH) * GROWTH


class KVCache:
    """The keys and values of one attention layer for the tokens read so far."""

    def __init__(self) -> None:
        self.keys_BGCK: mx.array | None = None  # C: the tokens that there is room for
        self.values_BGCK: mx.array | None = None
        self.num_tokens = 0

    @property
    def nbytes(self) -> int:
        return 0 if self.keys_BGCK is None else 2 * self.keys_BGCK.nbytes

    def extend(self, k_BGTK: mx.array, v_BGTK: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values, the new ones last."""
        start, end = self.num_tokens, self.num_tokens + k_BGTK.shape[2]
        keys_BGCK, values_BGCK = self.keys_BGCK, self.values_BGCK
        if keys_BGCK is None or values_BGCK is None or end > keys_BGCK.shape[2]:
            keys_BGCK = self.keys_BGCK = grown(keys_BGCK, start, end, k_BGTK)
            values_BGCK = self.values_BGCK = grown(values_BGCK, start, end, v_BGTK)
        keys_BGCK[:, :, start:end], values_BGCK[:, :, start:end] = k_BGTK, v_BGTK
        self.num_tokens = end
        if not start:
            return k_BGTK, v_BGTK
        return keys_BGCK[:, :, :end], values_BGCK[:, :, :end]

    def for_rows(self, rows: int) -> KVCache:
        """The cache of one row for each of `rows` rows; the copy is made when it grows."""
        copy = KVCache()
        copy.num_tokens = self.num_tokens
        if self.keys_BGCK is not None and self.values_BGCK is not None:
            copy.keys_BGCK, copy.values_BGCK = (
                mx.broadcast_to(
                    held[:, :, : self.num_tokens], (rows, held.shape[1], self.num_tokens, held.shape[3])
                )
                for held in (self.keys_BGCK, self.values_BGCK)
            )
        return copy


def grown(held_BGCK: mx.array | None, start: int, end: int, like_BGTK: mx.array) -> mx.array:
    """A copy of the first `start` tokens with room for `end` tokens or more."""
    B, G, _, K = like_BGTK.shape
    room_BGCK = mx.zeros((B, G, room_for(end) - start, K), like_BGTK.dtype)
    return room_BGCK if held_BGCK is None else mx.concatenate([held_BGCK[:, :, :start], room_BGCK], axis=2)
