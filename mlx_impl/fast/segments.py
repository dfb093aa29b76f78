"""Packed rows for attention: each example is a row of its own, beside examples of similar length. NumPy only.

Attention of packed rows needs a mask that is an array, and with one MLX keeps T x T scores for the gradient,
of which most are masked away. Rows of single examples are causal and need no mask: their padding is at the
end, where no earlier query sees it. So an example of n tokens takes memory that grows with n, and time that
grows with n^2, whatever the length of the packed row. Outside of attention padding is not computed
(`kept_positions.py`).

Rows of similar length are a group. Its numbers of rows and of positions are powers of two, so that there are
few shapes for a compiled step. The rows of several groups lie one after the other as one row.
Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination", section 3.2, for the mask
that this saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data import SMALLEST_BUCKET, Batch

MAX_FILLED = 1 / 2  # of the packed positions: padding that a group may have so that there are fewer groups


class Group(NamedTuple):
    """Rows of attention that are as wide; both are powers of two, or the width is that of the packed rows."""

    rows: int
    width: int


def examples_apart(batch: Batch) -> tuple[Batch, list[Group]]:
    """The examples of a packed batch that have a target, one a row, the longest first.

    The new batch is (R, W); of several groups it is (1, M), all their rows one after the other.
    """
    starts, lengths = examples_of(batch)
    groups = groups_in(batch)
    place_M, is_token_M = places(starts, lengths, groups)
    shape = groups[0] if len(groups) == 1 else (1, -1)

    def moved(array_BT: np.ndarray) -> np.ndarray:
        return (is_token_M * array_BT.flat[place_M]).astype(array_BT.dtype).reshape(shape)

    inputs_BT, targets_BT, mask_BT = map(moved, (batch.inputs_BT, batch.targets_BT, batch.mask_BT))
    return Batch(inputs_BT, targets_BT, mask_BT, batch.num_tokens, batch.numbers), groups


def examples_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Where in the flattened (B, T) the examples with a target start, and their lengths, which fall."""
    assert batch.segment_BT is not None
    is_start_BT = np.ones(batch.segment_BT.shape, bool)
    is_start_BT[:, 1:] = batch.segment_BT[:, 1:] != batch.segment_BT[:, :-1]
    starts = np.flatnonzero(is_start_BT)
    lengths = np.diff(np.append(starts, is_start_BT.size))
    has_target = np.logical_or.reduceat(batch.mask_BT.reshape(-1), starts)
    has_target[0] |= not has_target.any()  # a batch without targets is one row
    order = np.argsort(-lengths[has_target], kind="stable")
    return starts[has_target][order], lengths[has_target][order]


def groups_in(batch: Batch) -> list[Group]:
    """The groups of rows of a packed batch."""
    return groups_of(examples_of(batch)[1], batch.inputs_BT.size, batch.inputs_BT.shape[1])


def groups_of(lengths: Sequence[int] | np.ndarray, positions: int, widest: int) -> list[Group]:
    """Of lengths that fall: as many rows a group as MAX_FILLED lets in, some of them empty at the end."""
    widths = [min(widest, power_of_two(max(int(n), SMALLEST_BUCKET))) for n in lengths]
    groups = []
    while widths:
        rows = np.pad(widths, (0, power_of_two(len(widths)) - len(widths)))
        num_fitting = int((np.cumsum(widths[0] - rows) <= MAX_FILLED * positions).sum())
        groups.append(Group(power_of_two(num_fitting + 1) // 2, widths[0]))
        widths = widths[groups[-1].rows :]
    return groups


def power_of_two(n: int) -> int:
    """The first that is not smaller."""
    return 1 << (n - 1).bit_length()


def places(starts: np.ndarray, lengths: np.ndarray, groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Of each of the M positions of groups its place in the flattened (B, T), and if a token is there."""
    missing = (0, sum(group.rows for group in groups) - len(starts))
    starts, lengths = np.pad(starts, missing), np.pad(lengths, missing)
    place, is_token, first = [], [], 0
    for rows, width in groups:
        time_W, of_group = np.arange(width), slice(first, first := first + rows)
        is_token.append((time_W < lengths[of_group, None]).ravel())
        place.append((starts[of_group, None] + time_W).ravel() * is_token[-1])
    return np.concatenate(place), np.concatenate(is_token)
