"""Unpadding and prefix sharing: gather and scatter between (B, T) and the kept positions.

Of a batch of B rows and T columns, S of the B * T positions are kept, one after another as one row; linears,
norms and gates work on these. Only attention needs the rows again: `scatter` puts each kept position into its
place, a shared one into every row, and a dummy into all other places, whose values reach no loss and whose
gradient is zero. Dropout, if there is any, is the same for all rows at a shared position.
No twin in reference/, which computes every position. Sources: see `kept_positions.py`.
"""

from __future__ import annotations

import mlx.core as mx


class Unpadding:
    """Moves values by the index arrays of `kept_positions.KeptPositions`.

    The gradients are written out: moves the other way, and at shared positions a sum over the rows. Automatic
    differentiation would add everything into zeros, which takes eight times as long on a CPU.
    """

    def __init__(
        self,
        kept_S: mx.array,
        source_BT: mx.array,
        own_BT: mx.array,
        is_needed_S: mx.array,
        is_shared_S: mx.array | None = None,
    ) -> None:
        self.kept_S, self.source_BT, self.own_BT = kept_S, source_BT, own_BT
        self.is_needed_S, self.is_shared_S = is_needed_S, is_shared_S
        self.indices: dict[int, tuple[mx.array, ...]] = {}  # the same in every layer

    def index_of(self, H: int) -> tuple[mx.array, ...]:
        """The indices of heads: kept_S into the flattened (B, H, T); source_BT and own_BT into (S, H)."""
        if H not in self.indices:
            T, head_H = self.source_BT.shape[1], mx.arange(H)
            row_S, column_S = self.kept_S // T, self.kept_S % T
            kept_SH = (row_S[:, None] * H + head_H) * T + column_S[:, None]
            rows = [of_BT[:, None, :] * H + head_H[:, None] for of_BT in (self.source_BT, self.own_BT)]
            self.indices[H] = kept_SH, *rows
        return self.indices[H]

    def gather(self, x_BHTK: mx.array) -> mx.array:
        """(B, H, T, K) to (1, S, H * K)."""
        H = x_BHTK.shape[1]

        @mx.custom_function
        def forward(x_BHTK: mx.array) -> mx.array:
            return self.take(x_BHTK)

        @forward.vjp
        def backward(_: mx.array, d_1SO: mx.array, __: mx.array) -> mx.array:
            return self.put(d_1SO, self.index_of(H)[2])

        return forward(x_BHTK)

    def scatter(self, x_1SO: mx.array, H: int) -> mx.array:
        """(1, S, H * K) to (B, H, T, K)."""

        @mx.custom_function
        def forward(x_1SO: mx.array) -> mx.array:
            return self.put(x_1SO, self.index_of(H)[1])

        @forward.vjp
        def backward(_: mx.array, d_BHTK: mx.array, __: mx.array) -> mx.array:
            return self.sum_over_rows(d_BHTK)

        return forward(x_1SO)

    def at(self, x_1SD: mx.array, position_N: mx.array) -> mx.array:
        """(1, N, D): the values at these positions of the flattened (B, T), distinct but for padding.

        Several rows may have a target at a shared position. A GPU would add up their gradients in any order,
        and two runs would differ in their last bits. So they are put into rows, and summed over these.
        """
        source_N = self.source_BT.flatten()[position_N]
        if self.is_shared_S is None:
            return x_1SD.squeeze(0)[source_N][None]

        @mx.custom_function
        def forward(x_1SD: mx.array) -> mx.array:
            return x_1SD.squeeze(0)[source_N][None]

        @forward.vjp
        def backward(_: mx.array, d_1ND: mx.array, __: mx.array) -> mx.array:
            B, T = self.source_BT.shape
            zeros = mx.zeros((B * T, d_1ND.shape[-1]), d_1ND.dtype)
            return self.sum_over_rows(zeros.at[position_N].add(d_1ND.squeeze(0)).reshape(B, 1, T, -1))

        return forward(x_1SD)

    def take(self, x_BHTK: mx.array) -> mx.array:
        return x_BHTK.flatten(0, 2)[self.index_of(x_BHTK.shape[1])[0]].flatten(1)[None]

    def put(self, x_1SO: mx.array, index_BHT: mx.array) -> mx.array:
        return x_1SO.reshape(x_1SO.shape[1] * index_BHT.shape[1], -1)[index_BHT]

    def sum_over_rows(self, d_BHTK: mx.array) -> mx.array:
        """Of each kept position its own gradient; of a shared one the sum over all rows."""
        d_1SO = self.take(d_BHTK)
        if self.is_shared_S is None:
            return d_1SO
        sum_TO = d_BHTK.sum(axis=0).swapaxes(0, 1).flatten(1)
        shared_1SO = sum_TO[self.kept_S % sum_TO.shape[0]][None]
        # A dummy may be at a shared position of another row, and the gradient there is not its own.
        own_1SO = mx.where(self.is_needed_S[:, None], d_1SO, 0)
        return mx.where(self.is_shared_S[:, None], shared_1SO, own_1SO)
