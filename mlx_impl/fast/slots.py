"""Slots that are computed once or not at all: padding, and what all rows of a batch begin with.

Of a batch of B rows and T columns, S of the B * T slots are kept and laid one after another, as one row;
linears, norms and gates work on these. Only attention needs the rows again: `spread` puts each kept slot into
its place, a shared one into every row, and into all other places one kept slot that no target sees, so what
stands there reaches no loss and gets a gradient of zero. Dropout, where there is any, drops the same of a
shared slot for all rows. Sources: Portes et al. 2023, "MosaicBERT", section 2.1 (unpadding); Liu et al. 2025,
"Prefix Grouper" (a shared prefix once, in training).
No twin in reference/, which computes every slot.
"""

from __future__ import annotations

import mlx.core as mx


class Slots:
    """Moves between slots and rows, by the index arrays of `layout.KeptSlots`.

    Gradients are moves too, and a sum over the rows of what they share: automatic differentiation would add
    all of it into zeros, eight times as slow on a CPU.
    """

    def __init__(
        self,
        slot_S: mx.array,
        place_BT: mx.array,
        home_BT: mx.array,
        is_seen_S: mx.array,
        is_shared_S: mx.array | None = None,
    ) -> None:
        self.slot_S, self.place_BT, self.home_BT = slot_S, place_BT, home_BT
        self.is_seen_S, self.is_shared_S = is_seen_S, is_shared_S
        self.indices: dict[int, tuple[mx.array, ...]] = {}  # the same in every layer

    def index_of(self, H: int) -> tuple[mx.array, ...]:
        """slot_S for pieces of H heads, into (B, H, T); place_BT and home_BT, into (S, H)."""
        if H not in self.indices:
            T, head_H = self.place_BT.shape[1], mx.arange(H)
            row_S, column_S = self.slot_S // T, self.slot_S % T
            slot_SH = (row_S[:, None] * H + head_H) * T + column_S[:, None]
            rows = [of_BT[:, None, :] * H + head_H[:, None] for of_BT in (self.place_BT, self.home_BT)]
            self.indices[H] = slot_SH, *rows
        return self.indices[H]

    def gather(self, x_BHTK: mx.array) -> mx.array:
        """(B, H, T, K) to (1, S, H * K)."""
        H = x_BHTK.shape[1]

        @mx.custom_function  # type: ignore[untyped-decorator]
        def forward(x_BHTK: mx.array) -> mx.array:
            return self.picked(x_BHTK)

        @forward.vjp  # type: ignore[untyped-decorator]
        def backward(_: mx.array, d_1SO: mx.array, __: mx.array) -> mx.array:
            return self.laid_out(d_1SO, self.index_of(H)[2])

        gathered: mx.array = forward(x_BHTK)
        return gathered

    def spread(self, x_1SO: mx.array, H: int) -> mx.array:
        """(1, S, H * K) to (B, H, T, K)."""

        @mx.custom_function  # type: ignore[untyped-decorator]
        def forward(x_1SO: mx.array) -> mx.array:
            return self.laid_out(x_1SO, self.index_of(H)[1])

        @forward.vjp  # type: ignore[untyped-decorator]
        def backward(_: mx.array, d_BHTK: mx.array, __: mx.array) -> mx.array:
            return self.summed(d_BHTK)

        spread: mx.array = forward(x_1SO)
        return spread

    def at(self, x_1SD: mx.array, position_N: mx.array) -> mx.array:
        """(1, N, D): what stands at these positions of the flattened (B, T); only fillers may repeat.

        Several rows may have a target in a shared slot. A GPU would add up their gradients in any order, and
        two runs would differ in their last bits; so they are laid out as rows, and summed over these. That
        adds into zeros, but only after the last block; a filler adds a zero.
        """
        place_N = self.place_BT.flatten()[position_N]
        if self.is_shared_S is None:
            return x_1SD.squeeze(0)[place_N][None]

        @mx.custom_function  # type: ignore[untyped-decorator]
        def forward(x_1SD: mx.array) -> mx.array:
            return x_1SD.squeeze(0)[place_N][None]

        @forward.vjp  # type: ignore[untyped-decorator]
        def backward(_: mx.array, d_1ND: mx.array, __: mx.array) -> mx.array:
            B, T = self.place_BT.shape
            zeros = mx.zeros((B * T, d_1ND.shape[-1]), d_1ND.dtype)
            return self.summed(zeros.at[position_N].add(d_1ND.squeeze(0)).reshape(B, 1, T, -1))

        chosen: mx.array = forward(x_1SD)
        return chosen

    def picked(self, x_BHTK: mx.array) -> mx.array:
        return x_BHTK.flatten(0, 2)[self.index_of(x_BHTK.shape[1])[0]].flatten(1)[None]

    def laid_out(self, x_1SO: mx.array, index_BHT: mx.array) -> mx.array:
        return x_1SO.reshape(x_1SO.shape[1] * index_BHT.shape[1], -1)[index_BHT]

    def summed(self, d_BHTK: mx.array) -> mx.array:
        """Picked, and of a shared slot what all its places have: in a row without a target that is zero."""
        d_1SO = self.picked(d_BHTK)
        if self.is_shared_S is None:
            return d_1SO
        sum_TO = d_BHTK.sum(axis=0).swapaxes(0, 1).flatten(1)
        shared_1SO = sum_TO[self.slot_S % sum_TO.shape[0]][None]
        # A filler can stand where a row has a shared slot, and the gradient there is not its own.
        own_1SO = mx.where(self.is_seen_S[:, None], d_1SO, 0)
        return mx.where(self.is_shared_S[:, None], shared_1SO, own_1SO)
