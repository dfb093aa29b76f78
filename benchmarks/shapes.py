"""The `Shapes` of a case: those of the batch that needs the most memory."""

from __future__ import annotations

from mlx_impl.data import Batch
from mlx_impl.fast.kept_positions import kept_positions, target_positions

from .cases import Case
from .inputs import Inputs
from .memory import Shapes, budget_of


def shapes_of(case: Case, inputs: Inputs) -> Shapes:
    of_batches = [shapes_of_batch(case, inputs, batch) for window in inputs.windows for batch in window]
    return max(of_batches, key=lambda shapes: budget_of(shapes).peak_bytes)


def shapes_of_batch(case: Case, inputs: Inputs, batch: Batch) -> Shapes:
    rows, tokens = batch.inputs_BT.shape
    kept, num_targets = kept_positions(batch), len(target_positions(batch)[0])
    seen = len(kept.kept_U) if kept else rows * tokens
    return Shapes(inputs.config, case.rank, rows, tokens, seen, num_targets, case.dtype, case.checkpointed)
