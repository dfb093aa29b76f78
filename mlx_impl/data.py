"""Examples (tokens and which of them are targets) -> padded or packed batches -> windows. NumPy only.

Each token is marked as a target or not, from the tokenizer to the loss, so padding, prompt and answer cannot
be confused.
Differs from reference/data.py: rows are padded to a few shape buckets, because `mx.compile` traces a step
again for each new shape; packed rows alone have segments, the others need none; a batch knows its numbers of
tokens and of examples, for reports; windows may begin at a later update; what cannot be trained on is
refused; evaluation has batches of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from .batching import Row, window_rows
from .config import TrainConfig

SMALLEST_BUCKET = 8
WIDTH_BUCKETS = 4  # shape buckets from n to 2n


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model is trained to predict it."""

    tokens: tuple[int, ...]
    is_target: tuple[bool, ...]


class Batch(NamedTuple):
    inputs_BT: np.ndarray
    targets_BT: np.ndarray  # the token after each input
    mask_BT: np.ndarray  # whether that token is a target
    num_tokens: int  # inputs, padding not counted
    numbers: tuple[int, ...] = ()  # which examples these are, from 0
    segment_BT: np.ndarray | None = None  # in packed rows: which example of its row an input belongs to


Window = list[Batch]  # the micro-batches of one update; not the attention window


def make_batch(examples: Sequence[Example], numbers: Sequence[int] = ()) -> Batch:
    """Rows padded on the right to a common width; position t predicts token t + 1."""
    longest = max(1, *(len(example.tokens) - 1 for example in examples))
    width = bucket_size(longest, WIDTH_BUCKETS)
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
    """Sequence packing: rows of several examples, each with its own segment number.

    An example of n tokens has n - 1 inputs and its own last token as last target, so none predicts the next
    example's first token.
    """
    longest = max(1, *(sum(num_inputs(examples[i]) for i in row) for row in rows))
    width = bucket_size(longest, WIDTH_BUCKETS)
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


def bucket_size(size: int, buckets: int) -> int:
    """`size` rounded up to a shape bucket; `buckets` (a power of two) of them lie between n and 2n.

    A compiled step is traced again for every new shape of a batch. Buckets keep these to a few.
    """
    step = max(SMALLEST_BUCKET, (1 << (size - 1).bit_length()) // 2 // buckets)
    return -(-size // step) * step


def training_windows(
    examples: Sequence[Example], config: TrainConfig, first_step: int = 0
) -> Iterator[Window]:
    """The windows of the updates from `first_step`, counted from 0; `batching.py` chooses their examples."""
    if not examples:
        raise ValueError("training needs at least one example, got none")
    lengths = [num_inputs(example) for example in examples]
    make = make_packed_batch if config.batching == "packed" else make_plain_batch
    num_updates = max(0, config.iters - first_step)
    for batches in islice(window_rows(lengths, config, first_step), num_updates):
        window = [make(examples, batch) for batch in batches]
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
    """Every example once, sorted by length to save padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for start in range(0, len(ordered), batch_size):
        yield make_batch(ordered[start : start + batch_size])
