"""How much memory a step and an evaluation need on a CPU, beside weights and state.

    training   = max(kept + gradients + moment, kept + moment of the head)
    kept       = (L - 1) block - U D + block of the last one, of whose part after attention N targets are kept
    block      = U (4 D + H K + 3 F + ranks + more) + B T (H K + 2 G K) + scores
    evaluation = moment

times the bytes of a number; the factors in the type of the weights are kept too. L is the number of blocks
from the first one with an adapter on, whose input needs no gradient and is not kept. Checkpointed: L U D in
place of the blocks. Queries, keys and values are kept in rows, of all places; where they have norms, of
computed positions also before these. Where few positions are targets, a moment before the last block may
hold more.
`memory_moments.py` has the moments and the letters, `memory_scores.py` scores and masks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..data import bucket_size
from .cpu_ops import PIECE
from .head import CHUNK_LOGITS, PACKED_ROWS
from .kept_positions import TARGET_BUCKETS
from .memory_linears import FLOAT, LINEARS
from .memory_moments import (
    BEFORE_LAST,
    CHECKPOINTED,
    CHECKPOINTED_HEAD,
    EVALUATION,
    EVALUATION_HEAD,
    STEP,
    STEP_HEAD,
    Moment,
)
from .memory_scores import (
    attention_rows,
    band_keys,
    kept_scores_bytes,
    mask_bytes,
    mask_numbers,
    scores_at_once_bytes,
)
from .memory_sizes import Shape, Sizes
from .memory_work import NEXT_CHUNKS

COUNT = re.compile(r"([a-z]+)(-?[\d.]+)")
FEW_PARTS_AT_ONCE = 3  # of the logits of a packed head, in training
MANY_PARTS_AT_ONCE = 6  # where it has many
PARTS_AHEAD = 3  # of a packed head are allocated while the last block is computed


def backward_bytes(sizes: Sizes, shape: Shape, checkpointed: bool) -> int:
    """The most of forward and backward pass, without weights and state."""
    gradients, hidden = FLOAT * sizes.trained, shape.computed * sizes.config.hidden_size * sizes.itemsize
    blocks, unit = sizes.config.num_hidden_layers - sizes.below, units(sizes, shape)
    if checkpointed:
        of_block = most(CHECKPOINTED, sizes, unit) + gradients
        return int(blocks * hidden + max(of_block, most_of_head(CHECKPOINTED_HEAD, sizes, shape, True)))
    before = (blocks - 1) * block_bytes(sizes, shape) - hidden * (blocks > 1) + sizes.itemsize * sizes.trained
    kept = before + block_bytes(sizes, shape, targets_of(shape))
    made_again = scores_at_once_bytes(sizes, shape) - kept_scores_bytes(sizes, shape)
    made_again += mask_bytes(sizes, shape) if made_again > 0 else 0
    return int(
        max(
            kept + max(0, made_again) + most(STEP, sizes, unit) + gradients,
            before + most(BEFORE_LAST, sizes, unit) + gradients,
            kept + most_of_head(STEP_HEAD, sizes, shape, True),
        )
    )


def forward_bytes(sizes: Sizes, shape: Shape) -> int:
    """The most of a loss without gradients."""
    return int(
        max(most(EVALUATION, sizes, units(sizes, shape)), most_of_head(EVALUATION_HEAD, sizes, shape, False))
    )


def block_bytes(sizes: Sizes, shape: Shape, targets: int | None = None) -> int:
    """What a block keeps for the backward pass; after attention of so many targets, or of all positions."""
    c, after = sizes.config, shape.computed if targets is None else targets
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    numbers = float(shape.computed * (2 * c.hidden_size + sizes.more - sizes.more_after))
    numbers += after * (2 * c.hidden_size + queries + 3 * c.intermediate_size + sizes.more_after)
    in_rows = queries + 2 * keys * band_keys(sizes, shape)
    numbers += shape.computed * (sizes.ranks + (queries + keys) * c.qk_norm) + places(sizes, shape) * in_rows
    return int(numbers * sizes.itemsize) + kept_scores_bytes(sizes, shape)


def most(moments: Sequence[Moment], sizes: Sizes, unit: Mapping[str, float]) -> float:
    """Bytes of the moment that holds most, given those of an array of each letter."""
    is_longer = sizes.is_packed or sizes.is_dora
    moments = [moment for moment in moments if not (moment.short and is_longer)]
    return max(sum(count * unit[letter] for letter, count in of_kind(moment, sizes)) for moment in moments)


def of_kind(moment: Moment, sizes: Sizes) -> list[tuple[str, float]]:
    """The counts of a moment, with what this kind of model adds."""
    kinds = (
        (True, moment.base),
        (sizes.is_packed, moment.packed),
        (sizes.is_dora, moment.dora),
        (sizes.drops, moment.dropout),
        (sizes.itemsize < FLOAT, moment.half),
    )
    return [(letter, float(count)) for holds, text in kinds if holds for letter, count in COUNT.findall(text)]


def most_of_head(moments: Sequence[Moment], sizes: Sizes, shape: Shape, is_training: bool) -> float:
    """The same of the head, and a copy of logits that are summed in pieces."""
    V = sizes.config.vocab_size
    a_logit = logits_of(sizes, shape) / V
    is_copied, parts = V > PIECE and V % PIECE > 0, -(-V // PACKED_ROWS) if sizes.head else 1
    unit = units(sizes, shape)
    if parts > PARTS_AHEAD:  # the feed-forward has been freed by then
        unit["nf"] = 0
    need = most(moments, sizes, unit) + is_copied * V * a_logit + sizes.head
    a_part = PACKED_ROWS * FLOAT * min(targets_of(shape), CHUNK_LOGITS / V)  # bytes
    return need + (parts > 1) * a_part * logits_in_parts(V / PACKED_ROWS, is_copied, is_training)


def logits_in_parts(parts: float, is_copied: bool, is_training: bool) -> float:
    """Parts of the logits of a packed head that are held beside those that they are joined to."""
    if not is_training:
        return parts
    if is_copied or parts > PARTS_AHEAD + 1:
        return parts + min(2, int(parts))
    return MANY_PARTS_AT_ONCE if parts > PARTS_AHEAD else FEW_PARTS_AT_ONCE


def units(sizes: Sizes, shape: Shape) -> dict[str, float]:
    """Bytes of the arrays that `memory_moments.py` counts."""
    c, num, targets, rows = sizes.config, shape.computed, targets_of(shape), places(sizes, shape)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    numbers = {
        "m": mask_numbers(sizes, shape),
        "d": num * c.hidden_size,
        "f": num * c.intermediate_size,
        "q": num * queries,
        "k": num * keys,
        "r": num * sizes.ranks / LINEARS,
        "bq": rows * queries,
        "bk": rows * keys,
        "nd": targets * c.hidden_size,
        "nf": targets * c.intermediate_size,
        "nq": targets * queries,
        "w": sizes.largest,
    }
    of_letter = {letter: sizes.itemsize * number for letter, number in numbers.items()}
    return of_letter | {"s": scores_at_once_bytes(sizes, shape), "v": logits_of(sizes, shape)}


def logits_of(sizes: Sizes, shape: Shape) -> float:
    """Bytes of the logits of a chunk, and of what there is of the next, for which a packed head waits."""
    chunks = 1 if sizes.head else NEXT_CHUNKS
    return FLOAT * min(targets_of(shape) * sizes.config.vocab_size, chunks * CHUNK_LOGITS)


def places(sizes: Sizes, shape: Shape) -> int:
    """Positions of rows, padding too."""
    return sum(rows * width for rows, width in attention_rows(sizes, shape))


def targets_of(shape: Shape) -> int:
    """As many as the head reads: filled up, unless every position is one."""
    is_everywhere = shape.targets == shape.positions == shape.computed
    return shape.targets if is_everywhere else bucket_size(max(1, shape.targets), TARGET_BUCKETS)
