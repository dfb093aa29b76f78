"""Which rows and batches fit into so much memory, of a model of which only the configuration is read.

The need is that of memory_model.py for an update and an evaluation in which every position is a target, on
a GPU with what pace.py lets it queue, and 10% more; the lowest estimate that was measured was 8.8% low
(benchmarks/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..data import WIDTH_BUCKETS, bucket_size
from ..fast.described import described_sizes
from ..fast.memory_linears import FLOAT
from ..fast.memory_model import evaluation_bytes
from ..fast.memory_scores import turning_rows
from ..fast.memory_sizes import Shape, Sizes
from ..fast.pace import update_bytes
from ..files.described import Description
from ..files.quantized import Quantization

MARGIN_PERCENT = 10  # how far below MLX's peak an estimate may be; benchmarks/NOTES.md has what was measured
END = 2**20  # of tokens in a row, and of rows in a batch, where nothing else ends them
GROUP_SIZES = (64, 32)  # of 4 bits: mlx-lm's default; what a narrower model needs
BITS = 4
WHOLE_BITS = {32: "float32", 16: "bfloat16"}  # of weights that are not quantized


@dataclass(frozen=True)
class Setting:
    """How a model is trained: the bits of a weight, the type that it computes in, checkpointing."""

    bits: int
    dtype: str
    checkpointed: bool
    sizes: Sizes

    def bytes_needed(self, rows: int, tokens: int) -> int:
        """Of a batch of so many rows of so many tokens."""
        width = bucket_size(tokens, WIDTH_BUCKETS)
        shape = Shape(rows, width, rows * width, rows * width)
        update = update_bytes(self.sizes, shape, self.checkpointed)
        return max(update, evaluation_bytes(self.sizes, shape)) * (100 + MARGIN_PERCENT) // 100

    def most_needed(self, rows: int, tokens: int) -> int:
        """Of any batch of at most so many rows of at most so many tokens.

        A larger batch may need less, as too many scores are not kept (`memory_scores.turning_rows`). Up to
        there a need grows with the rows; beyond it is convex in them, and so largest at an end.
        """
        return max(
            self.bytes_needed(number, width)
            for width in widths(tokens)
            for turn in (turning_rows(self.sizes, width),)
            for number in {1, min(max(turn, 1), rows), min(turn + 1, rows), rows}
        )


def settings_of(model: Description) -> list[Setting]:
    """In 32 and 16 bits, and quantized as it is stored, or else in 4 bits; ValueError for a wrong model."""
    try:
        whole = [(bits, dtype, None) for bits, dtype in WHOLE_BITS.items()]
        kinds = [*whole, *((how.bits, quantized_dtype(), how) for how in quantizations(model))]
        return [
            Setting(bits, dtype, checkpointed, sizes)
            for bits, dtype, how in kinds
            for sizes in [sizes_in(model, dtype, how)]
            for checkpointed in (False, True)
        ]
    except ValueError as error:
        raise ValueError(f"{model.path}: {error}") from None


def quantizations(model: Description) -> list[Quantization]:
    """How it is stored; else in 4 bits, if its rows can be split into groups."""
    if model.quantization:
        return [model.quantization]
    c = model.config
    axes = (c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim)
    fitting = [size for size in GROUP_SIZES if not any(axis % size for axis in axes)]
    return [Quantization(size, BITS) for size in fitting[:1]]


def quantized_dtype() -> str:
    return "bfloat16" if mx.default_device() == mx.gpu else "float32"


def sizes_in(model: Description, dtype: str, how: Quantization | None) -> Sizes:
    group_size, bits = (how.group_size, how.bits) if how else (0, 0)
    return described_sizes(model.config, getattr(mx, dtype), group_size, bits)


def longest_row(setting: Setting, limit: int, most: int = END) -> int:
    """Tokens of the longest row that fits alone, as every shorter one does; 0 where none does."""
    return largest(lambda tokens: setting.most_needed(1, tokens) <= limit, most)


def largest_batch(setting: Setting, limit: int, tokens: int) -> int:
    """How many rows of at most so many tokens fit together, as fewer do; 0 where not even one does."""
    return largest(lambda rows: setting.most_needed(rows, tokens) <= limit, END)


def widths(tokens: int) -> list[int]:
    """Those of batches whose longest row has at most so many tokens."""
    found = [bucket_size(1, WIDTH_BUCKETS)]
    while found[-1] < tokens:
        found.append(bucket_size(found[-1] + 1, WIDTH_BUCKETS))
    return found


def num_weights(settings: Sequence[Setting]) -> int:
    """Of the model without an adapter: in the first setting all numbers are float32."""
    sizes = settings[0].sizes
    return sizes.weights // FLOAT - sizes.trained


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where every smaller one does too; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
