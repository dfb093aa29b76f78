"""Which slots of a batch are computed: those that a target sees, each once. NumPy only.

In a causal model a target sees its row up to itself, so padding is seen by none; and what all rows begin
with, such as the system prompt of a chat, has the same hidden states in each. `slots.py` moves tokens between
the slots by what is decided here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .data import SMALLEST, Batch, shape_size

SLOTS, SHARED = 8, 16  # sizes an octave: more than of rows and targets, most of a step is computed of them


class KeptSlots(NamedTuple):
    slot_S: np.ndarray  # of each kept one, where it stands in the flattened (B, T); the shared ones first
    place_BT: np.ndarray  # of each slot, which of the kept has its value
    home_BT: np.ndarray  # of each slot, which of the kept stands there; else one that no target sees
    is_seen_S: np.ndarray  # whether a target sees the kept one
    num_shared: int  # so many columns at the start are one in all rows


def kept_slots(batch: Batch) -> KeptSlots | None:
    """None where all are. One of them or more is seen by no target, and stands for what is left out."""
    mask_BT, T = batch.mask_BT, batch.mask_BT.shape[1]
    is_needed_BT = np.flip(np.logical_or.accumulate(np.flip(mask_BT, axis=1), axis=1), axis=1)
    num_shared = shared_columns(batch, is_needed_BT)
    is_shared_BT = is_needed_BT & (np.arange(T) < num_shared)
    shared, repeated = np.split(np.flatnonzero(is_shared_BT), [num_shared])  # of the first row; of the others
    needed = np.append(shared, np.flatnonzero(is_needed_BT & ~is_shared_BT))
    others = np.append(np.flatnonzero(~is_needed_BT), repeated)
    size = shape_size(len(needed) + 1, SLOTS)
    if size >= mask_BT.size:
        return None
    slot_S = np.append(needed, others[: size - len(needed)]).astype(np.int32)
    home_BT = np.full(mask_BT.shape, len(needed), np.int32)
    home_BT.flat[slot_S] = np.arange(size)
    place_BT = np.where(is_shared_BT, np.arange(T, dtype=np.int32), home_BT)
    return KeptSlots(slot_S, place_BT, home_BT, np.arange(size) < len(needed), num_shared)


def shared_columns(batch: Batch, is_needed_BT: np.ndarray) -> int:
    """How many columns at the start rows with a target have in common, or a bit less: one of few numbers."""
    rows = np.flatnonzero(is_needed_BT[:, 0])
    if len(rows) < 2:
        return 0
    is_alike_T = is_needed_BT[rows].all(axis=0)
    for array_BT in (batch.inputs_BT, batch.segment_BT):
        if array_BT is not None:
            is_alike_T &= (array_BT[rows] == array_BT[rows[0]]).all(axis=0)
    length = int(np.append(is_alike_T, False).argmin())
    return 0 if length < SMALLEST else length - length % max(1, (1 << length.bit_length()) // 2 // SHARED)
