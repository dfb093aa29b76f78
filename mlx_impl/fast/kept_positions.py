"""Which positions of a batch are computed: those that the loss depends on, shared prefixes once. NumPy only.

In a causal model a target depends on its own row up to itself. So padding is left out, and whatever follows a
row's last target; and a prefix that all rows share, such as a system prompt, has the same hidden states in
each. `unpadding.py` moves tokens between (B, T) and the kept positions.
Sources: Portes et al. 2023, "MosaicBERT", section 2.1 (unpadding); Liu et al. 2025, "Prefix Grouper".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data import SMALLEST_BUCKET, Batch, bucket_size
from .segments import SubBatch

KEPT_BUCKETS = 8  # from n to 2n; finer than for rows and targets, because most of a step's work is on them
TARGET_BUCKETS = 4
MIN_SHARED_FRACTION = 1 / 16  # of the needed positions: sharing that saves less is not worth its row sums


class KeptPositions(NamedTuple):
    """Index arrays. For rows `a b x y` and `a b z _`, with `a b` shared and the second row's `a` as dummy:

    kept_U = [0 1 2 3 6 4];  column_U = [0 1 2 3 2 0]
    source_BT = [[0 1 2 3] [0 1 4 5]];  own_BT = [[0 1 2 3] [5 5 4 5]]

    One or more dummy positions, which no target depends on, stand for all that is left out.
    """

    kept_U: np.ndarray  # where each kept position is in the flattened (B, T): shared, needed, dummies
    column_U: np.ndarray  # its place in its row; a GPU would compile kernels for each T
    source_BT: np.ndarray  # which kept position has the value of each position; a dummy if it is left out
    own_BT: np.ndarray  # index of the kept position taken from this very place; a dummy if none is
    is_needed_U: np.ndarray  # False marks a dummy
    is_shared_U: np.ndarray | None  # True: one for all rows with a target; None if none is shared


def kept_positions(batch: Batch, is_packed: bool = False) -> KeptPositions | None:
    """The positions to compute; None if all of them are."""
    mask_BT, T = batch.mask_BT, batch.mask_BT.shape[1]
    is_needed_BT = needed_positions(mask_BT)
    num_shared = shared_prefix_length(batch, is_needed_BT)
    is_shared_BT = is_needed_BT & (np.arange(T) < num_shared)
    # `shared` are those of the first row that has them, `repeated` those of the others.
    shared, repeated = np.split(np.flatnonzero(is_shared_BT), [num_shared])
    needed = np.append(shared, np.flatnonzero(is_needed_BT & ~is_shared_BT))
    dummies = np.append(repeated, np.flatnonzero(~is_needed_BT))
    size = kept_size(len(needed), is_packed)
    if size >= mask_BT.size:
        return None
    kept = without_sharing(needed, dummies, size, mask_BT.shape)
    if not num_shared:
        return kept
    source_BT = np.where(is_shared_BT, np.arange(T, dtype=np.int32), kept.own_BT)
    return kept._replace(source_BT=source_BT, is_shared_U=np.arange(size) < num_shared)


def kept_of(batch: Batch, sub_batches: Sequence[SubBatch]) -> KeptPositions | None:
    """The positions to compute of rows, or of several sub-batches; None if all of them are."""
    if len(sub_batches) > 1:
        return kept_in_sub_batches(batch, sub_batches)
    return kept_positions(batch, is_packed=len(sub_batches) == 1)


def kept_in_sub_batches(batch: Batch, sub_batches: Sequence[SubBatch]) -> KeptPositions:
    """The same of several sub-batches (`segments.py`), which are one row here; they share no prefix."""
    ends = np.cumsum([rows * width for rows, width in sub_batches])
    parts = zip(np.split(batch.mask_BT[0], ends[:-1]), sub_batches, strict=True)
    is_needed_M = np.concatenate([needed_positions(mask_M.reshape(of)).ravel() for mask_M, of in parts])
    needed, dummies = np.flatnonzero(is_needed_M), np.flatnonzero(~is_needed_M)
    size = min(kept_size(len(needed), is_packed=True), len(is_needed_M))
    return without_sharing(needed, dummies, size, batch.mask_BT.shape)


def kept_size(num_needed: int, is_packed: bool) -> int:
    """A shape bucket with room for a dummy. Packed rows fill buckets, so their dummies come on top of one."""
    if is_packed:
        return bucket_size(num_needed, KEPT_BUCKETS) + SMALLEST_BUCKET
    return bucket_size(num_needed + 1, KEPT_BUCKETS)


def needed_positions(mask_BT: np.ndarray) -> np.ndarray:
    """Those up to the last target of each row."""
    return np.flip(np.logical_or.accumulate(np.flip(mask_BT, axis=1), axis=1), axis=1)


def without_sharing(
    needed: np.ndarray, dummies: np.ndarray, size: int, shape: tuple[int, ...]
) -> KeptPositions:
    """The needed positions, filled up with dummies to this size; nothing is shared."""
    kept_U = np.append(needed, dummies[: size - len(needed)]).astype(np.int32)
    own_BT = np.full(shape, len(needed), np.int32)
    own_BT.flat[kept_U] = np.arange(size)
    is_needed_U = np.arange(size) < len(needed)
    return KeptPositions(kept_U, kept_U % shape[1], own_BT, own_BT, is_needed_U, None)


def shared_prefix_length(batch: Batch, is_needed_BT: np.ndarray) -> int:
    """The length of the prefix that all rows with a target share; 0 where sharing saves too little."""
    rows = np.flatnonzero(is_needed_BT[:, 0])
    if len(rows) < 2:
        return 0
    is_alike_T = is_needed_BT[rows].all(axis=0)
    is_alike_T &= (batch.inputs_BT[rows] == batch.inputs_BT[rows[0]]).all(axis=0)
    length = int(np.append(is_alike_T, False).argmin())
    return length if (len(rows) - 1) * length >= MIN_SHARED_FRACTION * is_needed_BT.sum() else 0


def target_positions(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """positions_N of the targets in the flattened (B, T), targets_N, and mask_N, False for padding."""
    positions_N = np.flatnonzero(batch.mask_BT).astype(np.int32)
    padding = bucket_size(max(1, len(positions_N)), TARGET_BUCKETS) - len(positions_N)
    padded_N = np.pad(positions_N, (0, padding))
    return padded_N, batch.targets_BT.reshape(-1)[padded_N], np.arange(len(padded_N)) < len(positions_N)
