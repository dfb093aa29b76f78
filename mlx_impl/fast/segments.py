"""Packed rows for attention: each example is a row of its own, beside examples of similar length. NumPy only.

Attention of packed rows needs a mask that is an array, and with one MLX keeps T x T scores for the gradient,
of which most are masked away. Rows of single examples are causal and need no mask: their padding is at the
end, where no earlier query sees it. So an example of n tokens takes memory that grows with n, and time that
grows with n^2, whatever the length of the packed row. Outside of attention padding is not computed
(`kept_positions.py`).

Rows of one width are a sub-batch. A batch has a few, all with as many positions; widths and numbers of rows
are powers of two. So batches have few shapes, and a compiled step is traced for each. The rows of several
sub-batches lie one after the other as one row.
Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination", section 3.2, for the mask
that this saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..data import SMALLEST_BUCKET, Batch

MAX_SUB_BATCHES = 4  # of a batch


class SubBatch(NamedTuple):
    """Rows of attention that are as wide: a power of two, or the width of the packed rows."""

    rows: int
    width: int


def examples_apart(batch: Batch) -> tuple[Batch, list[SubBatch]]:
    """The examples of a packed batch that have a target, one a row, the longest first.

    The new batch is (R, W); of several sub-batches it is (1, M), all their rows one after the other.
    """
    starts, lengths = examples_of(batch)
    sub_batches = sub_batches_in(batch)
    place_M, is_token_M = places(starts, lengths, sub_batches)
    shape = sub_batches[0] if len(sub_batches) == 1 else (1, -1)

    def moved(array_BT: np.ndarray) -> np.ndarray:
        return (is_token_M * array_BT.flat[place_M]).astype(array_BT.dtype).reshape(shape)

    inputs_BT, targets_BT, mask_BT = map(moved, (batch.inputs_BT, batch.targets_BT, batch.mask_BT))
    return Batch(inputs_BT, targets_BT, mask_BT, batch.num_tokens, batch.numbers), sub_batches


def examples_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Where in the flattened (B, T) examples with a target start, and their lengths, the longest first."""
    assert batch.segment_BT is not None
    is_start_BT = np.ones(batch.segment_BT.shape, bool)
    is_start_BT[:, 1:] = batch.segment_BT[:, 1:] != batch.segment_BT[:, :-1]
    starts = np.flatnonzero(is_start_BT)
    lengths = np.diff(np.append(starts, is_start_BT.size))
    has_target = np.logical_or.reduceat(batch.mask_BT.reshape(-1), starts)
    has_target[0] |= not has_target.any()  # a batch without targets is one row
    order = np.argsort(-lengths[has_target], kind="stable")
    return starts[has_target][order], lengths[has_target][order]


def sub_batches_in(batch: Batch) -> list[SubBatch]:
    """Those of a packed batch."""
    return sub_batches_of(examples_of(batch)[1], *batch.inputs_BT.shape)


def sub_batches_of(lengths: Sequence[int] | np.ndarray, rows: int, widest: int) -> list[SubBatch]:
    """Of packed rows the smallest layout with a row for each example; some of its rows may stay empty."""
    width_W, rows_LW, rows_from_LW = layouts(rows * widest, widest, MAX_SUB_BATCHES)
    too_long_W = (np.asarray(lengths)[:, None] > np.append(width_W[1:], 0)).sum(axis=0)  # for the next width
    rows_W = rows_LW[(rows_from_LW >= too_long_W).all(axis=1).argmax()]
    return [SubBatch(int(n), min(int(w), widest)) for n, w in zip(rows_W, width_W, strict=True) if n]


@cache
def layouts(positions: int, widest: int, at_most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """width_W, the widest first; rows_LW, the rows of each width in a layout; and those that wide or wider.

    A layout is a choice of widths and a size. Each of its sub-batches has so many positions, or one row where
    that is more. The smallest layout is first; one of the last has room for `positions` of the widest rows.
    """
    widths, sizes = powers_of_two(widest)[::-1], powers_of_two(positions * 2 * widest)
    choices = [choice for n in range(at_most) for choice in combinations(widths[::-1], n + 1)]
    is_chosen_CW = np.array([np.isin(widths, choice) for choice in choices])
    rows_CSW = np.maximum(1, sizes[:, None] // widths) * is_chosen_CW[:, None]
    rows_LW = rows_CSW.reshape(-1, len(widths))
    rows_LW = rows_LW[np.argsort(rows_LW @ widths, kind="stable")]
    return widths, rows_LW, rows_LW.cumsum(axis=1)


def powers_of_two(largest: int) -> np.ndarray:
    """Times the smallest bucket; the last is the first that is not smaller than `largest`."""
    return SMALLEST_BUCKET << np.arange((-(-largest // SMALLEST_BUCKET) - 1).bit_length() + 1)


def places(
    starts: np.ndarray, lengths: np.ndarray, sub_batches: Sequence[SubBatch]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each of the M positions its place in the flattened (B, T), and if a token is there."""
    missing = (0, sum(sub_batch.rows for sub_batch in sub_batches) - len(starts))
    starts, lengths = np.pad(starts, missing), np.pad(lengths, missing)
    place, is_token, first = [], [], 0
    for rows, width in sub_batches:
        time_W, in_it = np.arange(width), slice(first, first := first + rows)
        is_token.append((time_W < lengths[in_it, None]).ravel())
        place.append((starts[in_it, None] + time_W).ravel() * is_token[-1])
    return np.concatenate(place), np.concatenate(is_token)
