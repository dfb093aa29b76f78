"""What one block or the head works with, beside what is kept."""

from __future__ import annotations

from .head import CHUNK_LOGITS
from .memory_kept import block_bytes
from .memory_linears import FLOAT
from .memory_scores import kept_scores_bytes, mask_bytes, scores_at_once_bytes
from .memory_sizes import Shape, Sizes

LOGITS = 5  # arrays as large as the logits of one chunk
NEXT_CHUNKS = 1.84  # of logits that are there at once on a CPU, where there are several
PLAIN_LOGITS, PLAIN_EVALUATED_LOGITS = 6.5, 2.5  # arrays as large as all logits


def work_bytes(sizes: Sizes, shape: Shape) -> int:
    """What the backward pass of one block works with beside what is kept."""
    kept, scores = kept_scores_bytes(sizes, shape), scores_at_once_bytes(sizes, shape)
    block = block_bytes(sizes, shape) - kept
    return scores - kept + 2 * scores * FLOAT // sizes.itemsize + mask_bytes(sizes, shape) + block


def head_bytes(sizes: Sizes, shape: Shape, plain_copies: float | None = None) -> int:
    """Logits, masked, shifted, exponentials, gradient: of one chunk, or on a CPU of the next ones too."""
    logits = shape.targets * sizes.config.vocab_size
    if sizes.plain:
        return int((plain_copies or PLAIN_LOGITS) * FLOAT * logits)
    chunks = NEXT_CHUNKS if sizes.keeps_scores else 0.8
    return int(LOGITS * FLOAT * min(logits, chunks * CHUNK_LOGITS))


def packed_head_bytes(sizes: Sizes) -> int:
    """What is unpacked of the head, beside the last linear's weights: a third of what is there at once."""
    return sizes.head + sizes.unpacked // 3 if sizes.head else 0
