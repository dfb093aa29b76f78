"""How much memory a step, an evaluation and an answer need, from the shapes of what they read.

On a CPU the fast path is counted array by array (`memory_cpu.py`). The equations here are for a GPU and for
the plain path. Of B rows, T wide, of which U positions are computed outside of attention
(`kept_positions.py`), in bytes:

    training     = weights + state + max(kept + gradients + in full + work, kept + 5 logits + head, update)
    kept         = L blocks;  checkpointed: L hidden states and one block
    block        = U (4 D + 3 H K + 2 G K + 3 F + more) itemsize + scores
    scores       = B H T S itemsize on a CPU, on Metal, and on CUDA in float32; fused attention keeps none.
                   In a band (band.py) S is two windows, and many on a GPU are not kept.
                   Many of causal rows on a CPU are computed in chunks and not kept (query_chunks.py).
                   Packed examples are B rows of their own, T wide, in sub-batches (segments.py)
    work         = 2 scores + mask + one block without its scores
    evaluation   = weights + state + max(rest + max(3 scores + mask + 2 U F, 5 U F) + in full,
                                         5 logits + head)
    rest         = U (4 D + 3 H K + 2 G K) itemsize
    an answer    = an evaluation of the prompt + both copies of the key/value cache

L is the number of blocks; the other letters are those of the shape names. `logits` are those of one chunk of
the loss; on the plain path those of every position. `more` is what linears keep beside their inputs: what
dropout left of them, DoRA's directions; queries and keys before their norms; and on a CPU in 16 bits the
norms' inputs in float32. Places
of a row that are not computed have queries, keys, values and mixes too. The state is the moments, and the
factors and moments of the update before, which `guard.py` keeps: 5 numbers beside each factor. An update
makes three new ones.

`in full` are arrays as large as a weight (`memory_in_full.py`). What is kept is in `memory_kept.py`, scores
and masks are in `memory_scores.py`, working sets in `memory_work.py`, and what all depend on is in
`memory_sizes.py`.
tests/units/test_memory_bytes.py holds the estimate to a band around MLX's own peak, which includes work that
MLX queues ahead.
"""

from __future__ import annotations

from dataclasses import replace

from .kv_cache import room_for
from .memory_cpu import backward_bytes, forward_bytes
from .memory_kept import block_bytes, padded_numbers
from .memory_linears import FLOAT
from .memory_scores import mask_bytes, scores_at_once_bytes
from .memory_sizes import Shape, Sizes
from .memory_work import PLAIN_EVALUATED_LOGITS, head_bytes, packed_head_bytes, work_bytes
from .reading import part_width

STATE = 5  # numbers beside each factor: two moments, and the factor and its moments of the update before
AHEAD = 2  # arrays of scores, of an evaluation
UPDATE = 11  # more during an update: the gradient, the new factor and moments, intermediate results of Adam


def training_bytes(sizes: Sizes, shape: Shape, checkpointed: bool) -> int:
    """The most that an update of this batch holds at once; the equation is above."""
    update = UPDATE * FLOAT * sizes.trained
    if is_counted(sizes):
        return sizes.weights + state_bytes(sizes) + max(backward_bytes(sizes, shape, checkpointed), update)
    shape = computed_shape(sizes, shape)
    num_blocks, block = sizes.config.num_hidden_layers, block_bytes(sizes, shape)
    kept, work = num_blocks * block, work_bytes(sizes, shape)
    if checkpointed:
        at_once = 2 if sizes.plain else 1  # `mx.checkpoint` recomputes some blocks ahead
        kept = num_blocks * shape.computed * sizes.config.hidden_size * sizes.itemsize + at_once * block
        work = max(work, 0 if sizes.keeps_scores else 4 * block)  # measured on a GPU
    gradients = 2 * FLOAT * sizes.trained  # of a batch, and their sum
    backward = kept + gradients + sizes.unpacked + work
    of_head = kept + head_bytes(sizes, shape) + packed_head_bytes(sizes)
    return sizes.weights + state_bytes(sizes) + max(backward, of_head, update)


def evaluation_bytes(sizes: Sizes, shape: Shape) -> int:
    """The most that the loss over this batch holds at once: of the blocks one at a time.

    Where only some linears have adapters a CPU has fewer operations a block, so that MLX runs further ahead:
    in some runs it held up to AHEAD arrays of scores more. For such models it is the larger of both counts.
    """
    if not is_counted(sizes):
        return estimated_evaluation_bytes(sizes, shape)
    factors = FLOAT * sizes.trained  # copies of their own: `vectors.make_contiguous`
    counted = sizes.weights + state_bytes(sizes) + factors + forward_bytes(sizes, shape)
    if not sizes.is_partial:
        return counted
    ahead = AHEAD * scores_at_once_bytes(sizes, shape) if sizes.trained else 0
    return max(counted + ahead, estimated_evaluation_bytes(sizes, shape))


def estimated_evaluation_bytes(sizes: Sizes, shape: Shape) -> int:
    """By the equation above."""
    shape = computed_shape(sizes, shape)
    c, scores = sizes.config, scores_at_once_bytes(sizes, shape, backward=False)
    a_unit = shape.computed * sizes.itemsize
    rest = a_unit * (sizes.a_position - sizes.more - 3 * c.intermediate_size)
    rest += padded_numbers(sizes, shape) * sizes.itemsize
    copies, logits = (1, PLAIN_EVALUATED_LOGITS) if sizes.plain else (3, None)
    attention = copies * scores * FLOAT // sizes.itemsize + mask_bytes(sizes, shape)
    first, later = sizes.evaluated
    of_block = rest + max(attention + 2 * a_unit * c.intermediate_size, 5 * a_unit * c.intermediate_size)
    of_head = head_bytes(sizes, shape, logits) + packed_head_bytes(sizes)
    state = state_bytes(sizes)
    return sizes.weights + max(of_block + first, of_block + state + later, of_head + state)


def is_counted(sizes: Sizes) -> bool:
    """Whether `memory_cpu.py` has counted what is held."""
    return sizes.keeps_scores and not sizes.plain


def answer_bytes(sizes: Sizes, prompts: Shape, max_tokens: int) -> int:
    """Of reading the prompts and then writing so many tokens: a longer cache is a new one beside the old.

    A prompt is read without a band: with a window too, its queries have scores for every key.
    """
    window = sizes.config.sliding_window
    is_windowed = window is not None and window < prompts.keys
    c = replace(sizes.config, sliding_window=prompts.keys - 1 if is_windowed else None)
    sizes = replace(sizes, config=c)
    a_token = 2 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers * sizes.itemsize
    cache = 2 * prompts.rows * room_for(prompts.keys + max_tokens) * a_token
    width = min(prompts.width, part_width(prompts.rows))  # a long prompt is read in parts
    part = replace(prompts, width=width, computed=prompts.rows * width, seen=prompts.keys - width)
    return evaluation_bytes(sizes, part) + cache


def computed_shape(sizes: Sizes, shape: Shape) -> Shape:
    """The plain path computes every position, and the head at each."""
    return replace(shape, computed=shape.positions, targets=shape.positions) if sizes.plain else shape


def state_bytes(sizes: Sizes) -> int:
    """The state; on a GPU in 16 bits also the factors rounded, as they are and scaled (`rounded.py`)."""
    is_rounded = not (sizes.keeps_scores or sizes.plain) and sizes.itemsize < FLOAT
    return (STATE * FLOAT + 2 * sizes.itemsize * is_rounded) * sizes.trained
