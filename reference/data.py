"""Examples (tokens and which of them are targets) -> padded or packed batches -> windows.

Differs from mlx_impl/data.py: rows are as wide as the longest of them, because PyTorch needs no shape
buckets; every batch has segments; a batch is what the model needs and no more; the updates begin at the
first; nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlx_impl.config import TrainConfig
from reference.batching import Row, window_rows

Example = tuple[Sequence[int], Sequence[bool]]  # token ids, and for each whether it is a target


class Batch(NamedTuple):
    inputs_BT: Tensor
    targets_BT: Tensor  # the token after each input
    mask_BT: Tensor  # whether that token is a target
    segment_BT: Tensor | None = None  # in packed rows: which example of its row an input belongs to


def make_batch(examples: Sequence[Example], rows: Sequence[Row]) -> Batch:
    """Rows of one or more examples, padded on the right. An example's last token is no input."""
    width = max(1, *(sum(len(examples[i][0]) - 1 for i in row) for row in rows))
    inputs_BT = torch.zeros(len(rows), width, dtype=torch.long)
    targets_BT, mask_BT = torch.zeros_like(inputs_BT), torch.zeros(len(rows), width, dtype=torch.bool)
    segment_BT = torch.full_like(inputs_BT, -1)
    for b, row in enumerate(rows):
        t = 0
        for segment, (tokens, is_target) in enumerate(examples[i] for i in row):
            for token, following, is_next_target in zip(tokens, tokens[1:], is_target[1:], strict=False):
                inputs_BT[b, t], targets_BT[b, t] = token, following
                mask_BT[b, t], segment_BT[b, t] = is_next_target, segment
                t += 1
    return Batch(inputs_BT, targets_BT, mask_BT, segment_BT)


def training_windows(examples: Sequence[Example], config: TrainConfig) -> Iterator[list[Batch]]:
    """The micro-batches of every update."""
    lengths = [max(0, len(tokens) - 1) for tokens, _ in examples]
    for step in range(config.iters):
        yield [make_batch(examples, rows) for rows in window_rows(step, lengths, config)]
