"""The scores of attention, and its mask: what a block keeps of them, and what is there at once.

A CPU keeps the scores for the gradient, but for those of `query_chunks.py`. So does a GPU whose attention is
not fused in training: all of Metal, and CUDA in float32. Fused attention keeps none. Its backward pass makes
them again where rows are not of whole tiles. A mask that is an array it takes as numbers.
Source: `scaled_dot_product_attention` in MLX's fast.cpp, and the CUDA backend's (0.32.2).
"""

from __future__ import annotations

from . import band, query_chunks
from .memory_sizes import Shape, Sizes
from .segments import SubBatch

QUERY_CHUNKS = 2  # of scores at once: a CPU allocates those of the next one too
CUDA_TILE = 128  # queries, of cuDNN's backward pass
CUDA_MASKS = 3  # of the plain path, for each head: zeros, minus infinities, and the mask made of them


def attention_rows(sizes: Sizes, shape: Shape) -> tuple[SubBatch, ...]:
    """The rows of attention."""
    return (SubBatch(shape.rows, shape.width),) if sizes.plain or not shape.sub_batches else shape.sub_batches


def kept_scores_bytes(sizes: Sizes, shape: Shape) -> int:
    """Of the scores that a block keeps for the backward pass."""
    scores = 0
    for sub_batch in attention_rows(sizes, shape):
        of_rows = scores_of(sizes, shape, sub_batch)
        is_kept = sizes.keeps_scores or sizes.unfused
        in_turn = in_query_chunks(sizes, shape, of_rows) or in_band_in_turn(sizes, shape, sub_batch)
        scores += of_rows if is_kept and not in_turn else 0
    return scores * sizes.itemsize


def scores_at_once_bytes(sizes: Sizes, shape: Shape, backward: bool = True) -> int:
    """Of the scores that are there at once."""
    scores = 0
    for sub_batch in attention_rows(sizes, shape):
        of_rows = scores_of(sizes, shape, sub_batch)
        if in_query_chunks(sizes, shape, of_rows):
            of_rows = min(of_rows, QUERY_CHUNKS * query_chunks.MAX_SCORES)
        elif in_band_in_turn(sizes, shape, sub_batch):
            of_rows = min(of_rows, band.MAX_SCORES)
        if is_fused(sizes) and (not backward or queries_of(sizes, shape, sub_batch) % CUDA_TILE == 0):
            of_rows = 0
        scores += of_rows
    return scores * sizes.itemsize


def mask_bytes(sizes: Sizes, shape: Shape) -> int:
    """On the plain path of a CPU booleans, bias and its gradient; on CUDA booleans and their numbers."""
    if is_fused(sizes):
        windowed = [sub for sub in attention_rows(sizes, shape) if is_windowed(sizes, shape, sub)]
        scores = sum(scores_of(sizes, shape, sub) for sub in windowed)
        if sizes.plain:
            return CUDA_MASKS * scores * sizes.itemsize
        return scores // sizes.config.num_attention_heads * (1 + sizes.itemsize)
    masks = shape.masks if sizes.plain else 1
    return 6 * masks * mask_numbers(sizes, shape) if sizes.keeps_scores else 0


def mask_numbers(sizes: Sizes, shape: Shape) -> int:
    """Of a mask that is an array: one for all rows, in a band one for each row."""
    heads, numbers = sizes.config.num_attention_heads, 0
    for sub_batch in attention_rows(sizes, shape):
        of_rows = scores_of(sizes, shape, sub_batch)
        if in_query_chunks(sizes, shape, of_rows):
            of_rows = query_chunks.MAX_SCORES
        rows = 1 if in_band(sizes, shape, sub_batch) else sub_batch.rows
        numbers += of_rows // (heads * rows)
    return numbers


def band_keys(sizes: Sizes, shape: Shape) -> float:
    """How often a band keeps each key and value: chunks overlap. 1 elsewhere."""
    window, rows = sizes.config.sliding_window, attention_rows(sizes, shape)
    if window is None or not all(in_band(sizes, shape, sub_batch) for sub_batch in rows):
        return 1
    return band.keys_of(window) / band.chunk_of(window)


def is_fused(sizes: Sizes) -> bool:
    return not (sizes.keeps_scores or sizes.unfused)


def scores_of(sizes: Sizes, shape: Shape, sub_batch: SubBatch) -> int:
    """How many scores rows have; in a band for each query those of the keys of its chunk."""
    window, keys = sizes.config.sliding_window, shape.seen + sub_batch.width
    if window is not None and in_band(sizes, shape, sub_batch):
        keys = band.keys_of(window)
    return sizes.config.num_attention_heads * sub_batch.rows * sub_batch.width * keys


def is_windowed(sizes: Sizes, shape: Shape, sub_batch: SubBatch) -> bool:
    """Whether the mask of these rows is an array also on a GPU."""
    window = sizes.config.sliding_window
    return window is not None and window < shape.seen + sub_batch.width


def in_band(sizes: Sizes, shape: Shape, sub_batch: SubBatch) -> bool:
    window = sizes.config.sliding_window
    return window is not None and not sizes.plain and not shape.seen and band.pays(sub_batch.width, window)


def in_band_in_turn(sizes: Sizes, shape: Shape, sub_batch: SubBatch) -> bool:
    """Whether a GPU makes the scores of a band again, some chunks after others, and keeps none."""
    return not sizes.keeps_scores and in_band(sizes, shape, sub_batch)


def in_query_chunks(sizes: Sizes, shape: Shape, scores: int) -> bool:
    is_causal = sizes.config.sliding_window is None and not shape.seen
    return sizes.keeps_scores and not sizes.plain and is_causal and query_chunks.are_needed(scores)


def queries_of(sizes: Sizes, shape: Shape, sub_batch: SubBatch) -> int:
    """How many queries a call of attention has."""
    window = sizes.config.sliding_window
    is_banded = window is not None and in_band(sizes, shape, sub_batch)
    return band.chunk_of(window) if window is not None and is_banded else sub_batch.width


def turning_rows(sizes: Sizes, width: int) -> int:
    """The most rows of this width whose scores are there all at once; of more they are computed in parts."""
    of_one = scores_of(sizes, Shape(1, width, width, width), SubBatch(1, width))
    return (query_chunks.MAX_SCORES if sizes.keeps_scores else band.MAX_SCORES) // of_one
