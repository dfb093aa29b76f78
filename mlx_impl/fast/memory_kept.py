"""What a block keeps for the backward pass."""

from __future__ import annotations

from .memory_scores import attention_rows, kept_scores_bytes
from .memory_sizes import Shape, Sizes


def block_bytes(sizes: Sizes, shape: Shape) -> int:
    kept = shape.computed * sizes.a_position + padded_numbers(sizes, shape)
    return kept * sizes.itemsize + kept_scores_bytes(sizes, shape)


def padded_numbers(sizes: Sizes, shape: Shape) -> int:
    """Queries, keys, values and mixes of the places in attention where no computed position is."""
    c, places = sizes.config, sum(rows * width for rows, width in attention_rows(sizes, shape))
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads)
    return heads * c.head_dim * max(0, places - shape.computed)
