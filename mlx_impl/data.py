"""Examples, tokens with their targets marked -> padded batches. NumPy only.

Each token carries its own mark "this one is a target" from the tokenizer to the loss, so padding, prompt and
answer cannot be confused. Differs from reference/: the reference is handed these arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .batching import Row, rows_of, window_rows
from .config import TrainConfig

SMALLEST = 8  # of sizes, see shape_size
WIDTHS, TARGETS = 4, 4  # sizes an octave


@dataclass(frozen=True)
class Example:
    """Token numbers, and of each whether the model is trained to predict it."""

    tokens: tuple[int, ...]
    is_target: tuple[bool, ...]


class Batch(NamedTuple):
    inputs_BT: np.ndarray
    targets_BT: np.ndarray  # the token after each input
    mask_BT: np.ndarray  # whether that token counts
    num_tokens: int  # inputs that are no padding
    numbers: tuple[int, ...] = ()  # which examples of the file these are, from 0
    segment_BT: np.ndarray | None = None  # of packed rows: which example of its row an input belongs to


Window = list[Batch]  # the batches of one optimizer update


def make_batch(examples: Sequence[Example], numbers: Sequence[int] = ()) -> Batch:
    """Rows padded on the right to a common width; position t predicts token t + 1."""
    longest = max(1, *(len(example.tokens) - 1 for example in examples))
    width = shape_size(longest, WIDTHS)
    tokens = np.zeros((len(examples), width + 1), dtype=np.int32)
    is_target = np.zeros((len(examples), width + 1), dtype=bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        is_target[row, : len(example.tokens)] = example.is_target
    num_tokens = sum(len(example.tokens) - 1 for example in examples)
    return Batch(tokens[:, :-1], tokens[:, 1:], is_target[:, 1:], num_tokens, tuple(numbers))


def make_plain_batch(examples: Sequence[Example], rows: Sequence[Row]) -> Batch:
    numbers = [number for row in rows for number in row]
    return make_batch([examples[i] for i in numbers], numbers)


def make_packed_batch(examples: Sequence[Example], rows: Sequence[Row]) -> Batch:
    """Rows of several examples one after another, each cut off from the next.

    An example of n tokens has n - 1 inputs, and its last target is its own last token: no target crosses.
    """
    width = shape_size(max(1, *(sum(num_inputs(examples[i]) for i in row) for row in rows)), WIDTHS)
    inputs_BT, targets_BT = np.zeros((2, len(rows), width), dtype=np.int32)
    mask_BT = np.zeros((len(rows), width), dtype=bool)
    segment_BT = np.full((len(rows), width), -1, dtype=np.int32)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples[i] for i in row):
            here = slice(start, start := start + num_inputs(example))
            inputs_BT[b, here], targets_BT[b, here] = example.tokens[:-1], example.tokens[1:]
            mask_BT[b, here], segment_BT[b, here] = example.is_target[1:], segment
    numbers = tuple(number for row in rows for number in row)
    return Batch(inputs_BT, targets_BT, mask_BT, int((segment_BT >= 0).sum()), numbers, segment_BT)


def num_inputs(example: Example) -> int:
    return max(0, len(example.tokens) - 1)


def shape_size(size: int, an_octave: int) -> int:
    """At least `size`, and one of few: of so many (a power of two) between n and 2n.

    A compiled step is traced anew for every shape of a batch, which is its rows, width, slots and targets: by
    unequal rows a few hundred in a thousand batches, by packed rows a handful.
    """
    step = max(SMALLEST, (1 << (size - 1).bit_length()) // 2 // an_octave)
    return -(-size // step) * step


def target_positions(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """positions_N in the flattened batch that have a target, the targets_N, and mask_N: False is filling."""
    positions_N = np.flatnonzero(batch.mask_BT).astype(np.int32)
    filling = shape_size(max(1, len(positions_N)), TARGETS) - len(positions_N)
    padded_N = np.pad(positions_N, (0, filling))
    return padded_N, batch.targets_BT.reshape(-1)[padded_N], np.arange(len(padded_N)) < len(positions_N)


def training_windows(
    examples: Sequence[Example], config: TrainConfig, first_step: int = 0
) -> Iterator[Window]:
    """The windows of the updates from `first_step` to the last; `batching` says which examples they have."""
    if not examples:
        raise ValueError("training needs at least one example, got none")
    lengths = [num_inputs(example) for example in examples]
    rows = rows_of(lengths, config)
    make = make_packed_batch if config.batching == "packed" else make_plain_batch
    for step in range(first_step, config.iters):
        window = [make(examples, batch) for batch in window_rows(step, rows, lengths, config)]
        if not any(batch.mask_BT.any() for batch in window):
            numbers = ", ".join(str(i + 1) for batch in window for i in batch.numbers)
            raise ValueError(f"an update needs at least one target, and the examples {numbers} have none")
        yield window


def require_tokens(examples: Sequence[Example], vocab_size: int) -> None:
    """ValueError that names the first example with a token that is not in the vocabulary."""
    for number, example in enumerate(examples, 1):
        if example.tokens and not 0 <= min(example.tokens) <= max(example.tokens) < vocab_size:
            raise ValueError(f"example {number}: tokens must be at least 0 and less than {vocab_size}")


def evaluation_batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """Every example once, neighbours of like length together to save padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for start in range(0, len(ordered), batch_size):
        yield make_batch(ordered[start : start + batch_size])
