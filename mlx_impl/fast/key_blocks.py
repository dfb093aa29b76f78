"""A key/value cache that grows in blocks: a new token is written in place, a full block is copied once."""

from __future__ import annotations

import mlx.core as mx

BLOCK = 256  # tokens


def whole_blocks(num_tokens: int) -> int:
    """The tokens of the blocks that hold so many."""
    return -(-num_tokens // BLOCK) * BLOCK


class BlockCache:
    """The keys and values of one attention layer for the tokens read so far: `generate.KeyValueCache`."""

    def __init__(self) -> None:
        self.keys_BGCK: mx.array | None = None  # C: room for whole blocks of tokens
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
            keys_BGCK = self.keys_BGCK = with_room(keys_BGCK, start, end, k_BGTK)
            values_BGCK = self.values_BGCK = with_room(values_BGCK, start, end, v_BGTK)
        keys_BGCK[:, :, start:end], values_BGCK[:, :, start:end] = k_BGTK, v_BGTK
        self.num_tokens = end
        if not start:
            return k_BGTK, v_BGTK
        return keys_BGCK[:, :, :end], values_BGCK[:, :, :end]

    def for_rows(self, rows: int) -> BlockCache:
        """The cache of one row for each of `rows` rows; the copy is made when it grows."""
        copy = BlockCache()
        copy.num_tokens = self.num_tokens
        if self.keys_BGCK is not None and self.values_BGCK is not None:
            copy.keys_BGCK, copy.values_BGCK = (
                mx.broadcast_to(
                    held[:, :, : self.num_tokens], (rows, held.shape[1], self.num_tokens, held.shape[3])
                )
                for held in (self.keys_BGCK, self.values_BGCK)
            )
        return copy


def with_room(held_BGCK: mx.array | None, start: int, end: int, like_BGTK: mx.array) -> mx.array:
    """A copy of the first `start` tokens with room for `end` tokens or more."""
    B, G, _, K = like_BGTK.shape
    room_BGCK = mx.zeros((B, G, whole_blocks(end) - start, K), like_BGTK.dtype)
    return room_BGCK if held_BGCK is None else mx.concatenate([held_BGCK[:, :, :start], room_BGCK], axis=2)
