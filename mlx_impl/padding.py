"""Padding that is not computed: the slots that no target can see are left out, except of attention.

Of a batch of B rows and T columns, S of the B * T slots are kept and laid one after another, as one row;
linears, norms and gates work on these. Only attention needs the rows again: `spread` puts each kept slot into
its place, and into every other place one kept slot that no target sees, so what stands there reaches no loss
and gets a gradient of zero. Source: Portes et al. 2023, "MosaicBERT", section 2.1 (unpadding).
No twin in reference/, which computes every slot.
"""

from __future__ import annotations

import mlx.core as mx


class Kept:
    """Which slots are kept, by two index arrays (`data.kept_slots`), each the other's inverse for those.

    slot_S says of the kept where in the flattened (B, T) they stand; place_BT of every slot which of the kept
    stands there. Each of the two functions is the other's gradient: automatic differentiation would add into
    zeros, eight times as slow on a CPU.
    """

    def __init__(self, slot_S: mx.array, place_BT: mx.array) -> None:
        self.slot_S, self.place_BT = slot_S, place_BT
        self.indices: dict[int, tuple[mx.array, mx.array]] = {}  # the same in every layer

    def index_of(self, H: int) -> tuple[mx.array, mx.array]:
        """Both index arrays for pieces of H heads: into (B, H, T) and into (S, H)."""
        if H not in self.indices:
            T, head_H = self.place_BT.shape[1], mx.arange(H)
            row_S, column_S = self.slot_S // T, self.slot_S % T
            slot_SH = (row_S[:, None] * H + head_H) * T + column_S[:, None]
            self.indices[H] = slot_SH, self.place_BT[:, None, :] * H + head_H[:, None]
        return self.indices[H]

    def gather(self, x_BHTK: mx.array) -> mx.array:
        """(B, H, T, K) to (1, S, H * K)."""
        H = x_BHTK.shape[1]

        @mx.custom_function  # type: ignore[untyped-decorator]
        def forward(x_BHTK: mx.array) -> mx.array:
            return x_BHTK.flatten(0, 2)[self.index_of(H)[0]].flatten(1)[None]

        @forward.vjp  # type: ignore[untyped-decorator]
        def backward(_: mx.array, d_1SO: mx.array, __: mx.array) -> mx.array:
            return self.spread(d_1SO, H)

        gathered: mx.array = forward(x_BHTK)
        return gathered

    def spread(self, x_1SO: mx.array, H: int) -> mx.array:
        """(1, S, H * K) to (B, H, T, K)."""

        @mx.custom_function  # type: ignore[untyped-decorator]
        def forward(x_1SO: mx.array) -> mx.array:
            return x_1SO.reshape(x_1SO.shape[1] * H, -1)[self.index_of(H)[1]]

        @forward.vjp  # type: ignore[untyped-decorator]
        def backward(_: mx.array, d_BHTK: mx.array, __: mx.array) -> mx.array:
            return self.gather(d_BHTK)

        spread: mx.array = forward(x_1SO)
        return spread
