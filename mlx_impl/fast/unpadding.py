"""Unpadding and prefix sharing: gather and scatter between (B, T) and the kept positions.

Of a batch of B rows and T columns, U of the B * T positions are kept, one after another as one row; linears,
norms and gates work on these. Only attention needs the rows again: `scatter` puts each kept position into its
place, a shared one into every row, and a dummy into all other places, whose values reach no loss and whose
gradient is zero. Dropout, if there is any, is the same for all rows at a shared position.
A GPU moves the heads of a position together: an index for each head is arithmetic, which it would compile for
seconds. A CPU moves each head to its place, which is faster than a copy of the whole in the order of heads.
No twin in reference/, which computes every position. Sources: see `kept_positions.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from . import ops


class Unpadding:
    """Moves values by the index arrays of `kept_positions.KeptPositions`.

    The gradients are written out: moves the other way, and at shared positions a sum over the rows. Automatic
    differentiation would add everything into zeros, which takes eight times as long on a CPU.
    """

    def __init__(
        self,
        kept_U: mx.array,
        column_U: mx.array,
        source_BT: mx.array,
        own_BT: mx.array,
        is_needed_U: mx.array,
        is_shared_U: mx.array | None = None,
    ) -> None:
        self.kept_U, self.column_U = kept_U, column_U
        self.source_BT, self.own_BT = source_BT, own_BT
        self.is_needed_U, self.is_shared_U = is_needed_U, is_shared_U
        self.indices: dict[tuple[int, int], mx.array] = {}  # the same in every layer

    def gather(self, x_BHTK: mx.array) -> mx.array:
        """(B, H, T, K) to (1, U, H * K)."""
        H = x_BHTK.shape[1]

        @mx.custom_function
        def forward(x_BHTK: mx.array) -> mx.array:
            return self.take(x_BHTK)

        @forward.vjp
        def backward(_: mx.array, d_1UO: mx.array, __: mx.array) -> mx.array:
            return self.put(d_1UO, self.own_BT, H)

        return forward(x_BHTK)

    def scatter(self, x_1UO: mx.array, H: int) -> mx.array:
        """(1, U, H * K) to (B, H, T, K)."""

        @mx.custom_function
        def forward(x_1UO: mx.array) -> mx.array:
            return self.put(x_1UO, self.source_BT, H)

        @forward.vjp
        def backward(_: mx.array, d_BHTK: mx.array, __: mx.array) -> mx.array:
            return self.sum_over_rows(d_BHTK)

        return forward(x_1UO)

    def at(self, x_1UD: mx.array, position_N: mx.array) -> mx.array:
        """(1, N, D): the values at these positions of the flattened (B, T), distinct but for padding.

        Several rows may have a target at a shared position. A GPU would add up their gradients in any order,
        and two runs would differ in their last bits. So they are put into rows, and summed over these.
        """
        source_N = self.source_BT.flatten()[position_N]
        if self.is_shared_U is None:
            return x_1UD.squeeze(0)[source_N][None]

        @mx.custom_function
        def forward(x_1UD: mx.array) -> mx.array:
            return x_1UD.squeeze(0)[source_N][None]

        @forward.vjp
        def backward(_: mx.array, d_1ND: mx.array, __: mx.array) -> mx.array:
            B, T = self.source_BT.shape
            zeros = mx.zeros((B * T, d_1ND.shape[-1]), d_1ND.dtype)
            return self.sum_over_rows(zeros.at[position_N].add(d_1ND.squeeze(0)).reshape(B, 1, T, -1))

        return forward(x_1UD)

    def take(self, x_BHTK: mx.array) -> mx.array:
        """(1, U, H * K): the values at the kept positions."""
        if ops.on_gpu():
            return x_BHTK.swapaxes(1, 2).flatten(0, 1).flatten(1)[self.kept_U][None]
        return x_BHTK.flatten(0, 2)[self.kept_of_heads(*x_BHTK.shape[1:3])].flatten(1)[None]

    def put(self, x_1UO: mx.array, index_BT: mx.array, H: int) -> mx.array:
        """(B, H, T, K): in each place the kept position with this index."""
        if ops.on_gpu():
            return mx.unflatten(x_1UO.squeeze(0)[index_BT], -1, (H, -1)).swapaxes(1, 2)
        return x_1UO.reshape(x_1UO.shape[1] * H, -1)[self.index_of_heads(index_BT, H)]

    def sum_over_rows(self, d_BHTK: mx.array) -> mx.array:
        """Of each kept position its own gradient; of a shared one the sum over all rows."""
        d_1UO = self.take(d_BHTK)
        if self.is_shared_U is None:
            return d_1UO
        sum_TO = d_BHTK.sum(axis=0).swapaxes(0, 1).flatten(1)
        shared_1UO = sum_TO[self.column_U][None]
        # A dummy may be at a shared position of another row, and the gradient there is not its own.
        own_1UO = mx.where(self.is_needed_U[:, None], d_1UO, 0)
        return mx.where(self.is_shared_U[:, None], shared_1UO, own_1UO)

    def kept_of_heads(self, H: int, T: int) -> mx.array:
        """(U, H): kept_U in the flattened (B, H, T)."""

        def index() -> mx.array:
            start_U = self.kept_U - self.column_U
            return (start_U * H + self.column_U)[:, None] + mx.arange(0, H * T, T)

        return self.once((id(self.kept_U), H), index)

    def index_of_heads(self, index_BT: mx.array, H: int) -> mx.array:
        """(B, H, T): the index in the flattened (U, H)."""
        return self.once((id(index_BT), H), lambda: index_BT[:, None, :] * H + mx.arange(H)[:, None])

    def once(self, key: tuple[int, int], index: Callable[[], mx.array]) -> mx.array:
        if key not in self.indices:
            self.indices[key] = index()
        return self.indices[key]
