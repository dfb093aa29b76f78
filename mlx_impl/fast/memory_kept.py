"""What a block keeps for the backward pass; and of attention what is there at once."""

from __future__ import annotations

from . import query_blocks
from .band import pays as band_pays
from .memory_sizes import Shape, Sizes
from .segments import Group

QUERY_BLOCKS = 2  # of scores at once: a CPU allocates those of the next one too


def block_bytes(sizes: Sizes, shape: Shape) -> int:
    kept = shape.computed * sizes.a_position + padded_numbers(sizes, shape)
    return kept * sizes.itemsize + scores_bytes(sizes, shape)


def padded_numbers(sizes: Sizes, shape: Shape) -> int:
    """Queries, keys, values and mixes of the places in groups where no computed position is."""
    c, places = sizes.config, sum(rows * width for rows, width in rows_of(sizes, shape))
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads)
    return heads * c.head_dim * max(0, places - shape.computed) if shape.groups else 0


def rows_of(sizes: Sizes, shape: Shape) -> tuple[Group, ...]:
    """The rows of attention."""
    return (Group(shape.rows, shape.width),) if sizes.plain or not shape.groups else shape.groups


def scores_bytes(sizes: Sizes, shape: Shape, at_once: bool = False) -> int:
    """Of the scores that a block keeps, or of those that it computes at once."""
    window, heads = sizes.config.sliding_window, sizes.config.num_attention_heads
    scores = 0
    for rows, width in rows_of(sizes, shape):
        if sizes.keeps_scores or sizes.unfused or (window is not None and window < shape.seen + width):
            of_rows = heads * rows * width * keys_of(sizes, width, shape.seen)
            in_blocks = in_query_blocks(sizes, shape, of_rows)
            of_blocks = QUERY_BLOCKS * query_blocks.MAX_SCORES * at_once
            scores += min(of_rows, of_blocks) if in_blocks else of_rows
    return scores * sizes.itemsize


def in_query_blocks(sizes: Sizes, shape: Shape, scores: int) -> bool:
    is_causal = sizes.config.sliding_window is None and not shape.seen
    return sizes.keeps_scores and not sizes.plain and is_causal and query_blocks.are_needed(scores)


def keys_of(sizes: Sizes, width: int, seen: int) -> int:
    """How many keys a query has scores for: in a band (`band.py`) those of two windows."""
    window = sizes.config.sliding_window
    if window is None or sizes.plain or seen or not band_pays(width, window):
        return seen + width
    return 2 * window
