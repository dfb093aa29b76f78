"""Which slots of a batch are computed: those that a target sees, each once. NumPy only.

In a causal model a target sees its row up to itself, so padding is seen by none; and what all rows begin
with, such as the system prompt of a chat, has the same hidden states in each. `slots.py` moves tokens between
the slots by what is decided here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..data import Batch, shape_size

SLOTS = 8  # sizes an octave: more than of rows and targets, most of a step is computed of them
WORTH_IT = 1 / 16  # of the slots that a target sees: sharing that saves less is not worth its sum over rows


class KeptSlots(NamedTuple):
    """Of rows `a b x y` and `a b z _`, every letter seen, with two shared columns and one filler, `a` again:

    slot_S = [0 1 2 3 6 4];  place_BT = [[0 1 2 3] [0 1 4 5]];  home_BT = [[0 1 2 3] [5 5 4 5]]
    """

    slot_S: np.ndarray  # of each kept one, where it stands in the flattened (B, T): shared, seen, fillers
    place_BT: np.ndarray  # of each slot, which of the kept has its value; a filler's where none sees it
    home_BT: np.ndarray  # of each slot, which of the kept stands just there; else a filler
    is_seen_S: np.ndarray  # whether a target sees the kept one; if not, it is a filler
    is_shared_S: np.ndarray | None  # whether it is one for all rows with a target; None where none is


def kept_slots(batch: Batch) -> KeptSlots | None:
    """None where all are. One or more are fillers: seen by no target, they stand for what is left out."""
    mask_BT, T = batch.mask_BT, batch.mask_BT.shape[1]
    is_needed_BT = np.flip(np.logical_or.accumulate(np.flip(mask_BT, axis=1), axis=1), axis=1)
    num_shared = shared_columns(batch, is_needed_BT)
    is_shared_BT = is_needed_BT & (np.arange(T) < num_shared)
    shared, repeated = np.split(np.flatnonzero(is_shared_BT), [num_shared])  # row by row: the first has them
    seen = np.append(shared, np.flatnonzero(is_needed_BT & ~is_shared_BT))
    others = np.append(repeated, np.flatnonzero(~is_needed_BT))  # a token that counts, where there is one
    size = shape_size(len(seen) + 1, SLOTS)
    if size >= mask_BT.size:
        return None
    slot_S = np.append(seen, others[: size - len(seen)]).astype(np.int32)
    home_BT = np.full(mask_BT.shape, len(seen), np.int32)
    home_BT.flat[slot_S] = np.arange(size)
    place_BT = np.where(is_shared_BT, np.arange(T, dtype=np.int32), home_BT)
    is_shared_S = np.arange(size) < num_shared if num_shared else None
    return KeptSlots(slot_S, place_BT, home_BT, np.arange(size) < len(seen), is_shared_S)


def shared_columns(batch: Batch, is_needed_BT: np.ndarray) -> int:
    """How many columns at the start all rows with a target have in common; 0 where that saves too little."""
    rows = np.flatnonzero(is_needed_BT[:, 0])
    if len(rows) < 2:
        return 0
    is_alike_T = is_needed_BT[rows].all(axis=0)
    for array_BT in (batch.inputs_BT, batch.segment_BT):
        if array_BT is not None:
            is_alike_T &= (array_BT[rows] == array_BT[rows[0]]).all(axis=0)
    length = int(np.append(is_alike_T, False).argmin())
    return length if (len(rows) - 1) * length >= WORTH_IT * is_needed_BT.sum() else 0
