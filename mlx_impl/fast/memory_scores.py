"""The scores of attention, and its mask: what a block keeps of them, and what is there at once.

A CPU keeps the scores for the gradient, but for those of `query_blocks.py`. So does a GPU whose attention is
not fused in training: all of Metal, and CUDA in float32. Fused attention keeps none. Its backward pass makes
them again where rows are not of whole tiles, and takes a mask that is an array as a number for each score.
Source: `scaled_dot_product_attention` in MLX's fast.cpp, and the CUDA backend's (0.32.2).
"""

from __future__ import annotations

from . import band, query_blocks
from .memory_sizes import Shape, Sizes
from .segments import Group

QUERY_BLOCKS = 2  # of scores at once: a CPU allocates those of the next one too
CUDA_TILE = 128  # queries, of cuDNN's backward pass
CUDA_MASKS = 3  # zeros, minus infinities, and the mask made of them; once for all blocks of a compiled step


def rows_of(sizes: Sizes, shape: Shape) -> tuple[Group, ...]:
    """The rows of attention."""
    return (Group(shape.rows, shape.width),) if sizes.plain or not shape.groups else shape.groups


def kept_scores_bytes(sizes: Sizes, shape: Shape) -> int:
    """Of the scores that a block keeps for the backward pass."""
    scores = 0
    for group in rows_of(sizes, shape):
        of_rows = scores_of(sizes, shape, group)
        is_kept = sizes.keeps_scores or sizes.unfused
        in_turn = in_query_blocks(sizes, shape, of_rows) or in_band_in_turn(sizes, shape, group)
        scores += of_rows if is_kept and not in_turn else 0
    return scores * sizes.itemsize


def scores_at_once_bytes(sizes: Sizes, shape: Shape, backward: bool = True) -> int:
    """Of the scores that are there at once."""
    scores = 0
    for group in rows_of(sizes, shape):
        of_rows = scores_of(sizes, shape, group)
        if in_query_blocks(sizes, shape, of_rows):
            of_rows = min(of_rows, QUERY_BLOCKS * query_blocks.MAX_SCORES)
        elif in_band_in_turn(sizes, shape, group):
            of_rows = band.MAX_SCORES
        if is_fused(sizes) and (not backward or queries_of(sizes, shape, group) % CUDA_TILE == 0):
            of_rows = 0
        scores += of_rows
    return scores * sizes.itemsize


def mask_bytes(sizes: Sizes, shape: Shape) -> int:
    """On a CPU booleans, the bias made of them, and its gradient; on CUDA a number for each score."""
    masks, heads, numbers = shape.masks if sizes.plain else 1, sizes.config.num_attention_heads, 0
    for group in rows_of(sizes, shape):
        of_rows = scores_of(sizes, shape, group)
        if is_fused(sizes):
            numbers += of_rows if is_windowed(sizes, shape, group) else 0
        elif in_query_blocks(sizes, shape, of_rows):
            numbers += query_blocks.MAX_SCORES // (heads * group.rows)
        else:
            numbers += of_rows // (heads * group.rows)
    if is_fused(sizes):
        return CUDA_MASKS * numbers * sizes.itemsize
    return 6 * masks * numbers if sizes.keeps_scores else 0


def is_fused(sizes: Sizes) -> bool:
    return not (sizes.keeps_scores or sizes.unfused)


def scores_of(sizes: Sizes, shape: Shape, group: Group) -> int:
    """How many scores rows have: in a band (`band.py`) for each query those of two windows."""
    window, keys = sizes.config.sliding_window, shape.seen + group.width
    if window is not None and in_band(sizes, shape, group):
        keys = 2 * window
    return sizes.config.num_attention_heads * group.rows * group.width * keys


def is_windowed(sizes: Sizes, shape: Shape, group: Group) -> bool:
    """Whether the mask of these rows is an array also on a GPU."""
    window = sizes.config.sliding_window
    return window is not None and window < shape.seen + group.width


def in_band(sizes: Sizes, shape: Shape, group: Group) -> bool:
    window = sizes.config.sliding_window
    return window is not None and not sizes.plain and not shape.seen and band.pays(group.width, window)


def in_band_in_turn(sizes: Sizes, shape: Shape, group: Group) -> bool:
    """Whether a GPU makes the scores of some blocks of a band after those of others, and keeps none."""
    is_large = scores_of(sizes, shape, group) > band.MAX_SCORES
    return not sizes.keeps_scores and in_band(sizes, shape, group) and is_large


def in_query_blocks(sizes: Sizes, shape: Shape, scores: int) -> bool:
    is_causal = sizes.config.sliding_window is None and not shape.seen
    return sizes.keeps_scores and not sizes.plain and is_causal and query_blocks.are_needed(scores)


def queries_of(sizes: Sizes, shape: Shape, group: Group) -> int:
    """How many queries a call of attention has."""
    window = sizes.config.sliding_window
    return window if window is not None and in_band(sizes, shape, group) else group.width


def turning_rows(sizes: Sizes, width: int) -> int:
    """The most rows of this width whose scores are there all at once; of more they are computed in parts."""
    of_one = scores_of(sizes, Shape(1, width, width, width), Group(1, width))
    return (query_blocks.MAX_SCORES if sizes.keeps_scores else band.MAX_SCORES) // of_one
