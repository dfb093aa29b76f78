"""The shapes of a case that its memory follows from: those of its largest batch."""

from __future__ import annotations

from mlx_impl.data import target_positions
from mlx_impl.layout import kept_slots

from .cases import Case
from .inputs import Inputs
from .memory import Shapes


def shapes_of(case: Case, inputs: Inputs) -> Shapes:
    batch = max((b for window in inputs.windows for b in window), key=lambda b: b.inputs_BT.size)
    rows, tokens = batch.inputs_BT.shape
    kept, num_targets = kept_slots(batch), len(target_positions(batch)[0])
    seen = len(kept.slot_S) if kept else rows * tokens
    return Shapes(inputs.config, case.rank, rows, tokens, seen, num_targets, case.dtype, case.checkpointed)
