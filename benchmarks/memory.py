"""Where memory goes: the peak of a step from its shapes, term by term, to be held against what was measured.

    peak = base + trained + max(backward, update)
    backward = what L blocks keep + max(the head, what one block's backward pass works with)
    backward, checkpointed = L inputs + max(the head, one block made again and its backward pass)
    update   = the new factors and moments beside the old ones, the gradients, and what the arithmetic needs

The tables below are the model. They list what MLX keeps, and whoever changes what is kept edits a line:
`python -m benchmarks memory` prints them with the bytes of a case. A tensor is kept when the gradient of
something needs it: the factors need the input of every linear, a product needs its other side, a norm its
input. A frozen weight needs nothing, so the output of a linear is kept only where something else wants it.
Checkpointing (Chen et al. 2016, "Sublinear Memory Cost") keeps a block's input alone, and one block at a time
whole. No term depends on how many steps were done.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mlx_impl.config import ModelConfig

from .flops import linear_shapes

CHUNK_LOGITS = 2**25  # that of mlx_impl/fast/head.py, which cannot be imported before a BLAS is chosen
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Kept:
    """`count` tensors of prod(`axes`) numbers a position; the axes are letters of `sizes`."""

    what: str
    axes: str  # D width, Q all queries, G all keys, H heads, S keys seen, F ffn, V vocabulary, R rank, 1
    count: float
    why: str


ATTENTION = (  # of every position of a row, padding too
    Kept("q, turned", "Q", 1, "scores: the gradient of k"),
    Kept("k and v, turned", "G", 2, "scores and mix: the gradients of q and of the weights"),
    Kept("attention weights", "HS", 1, "softmax and mix; a fused kernel on a GPU keeps none"),
)
BEFORE = (  # of the positions that a target depends on (mlx_impl/fast/kept_positions.py)
    Kept("x, before attention", "D", 1, "the norm's input"),
    Kept("its norm", "D", 1, "the input of A in q, k, v"),
    Kept("A x of q, k, v", "R", 3, "the gradient of B"),
    Kept("1 / root mean square of x", "1", 1, "the norm's own scale"),
)
AFTER = (  # of the same, but in the last block of the targets alone
    Kept("mix of the values", "Q", 1, "the input of A in o"),
    Kept("x, before the feed-forward", "D", 1, "the norm's input"),
    Kept("its norm", "D", 1, "the input of A in gate, up"),
    Kept("1 / root mean square of x", "1", 1, "the norm's own scale"),
    Kept("gate and up", "F", 2, "each a side of a product"),
    Kept("sigmoid(gate)", "F", 1, "the gradient of silu; a GPU makes it again instead"),
    Kept("A x of o, gate, up, down", "R", 4, "the gradient of B"),
)
HEAD = (  # of target positions, rounded up as `data.bucket_size` says
    Kept("the last hidden state there", "D", 1, "what the head reads"),
    Kept("its gradient", "D", 1, "what the head's chunk gives"),
    Kept("logits, shifted, their exponentials, gradient", "V", 4, "of one chunk: head.py has at most 2**25"),
)
TRAINED = (  # copies of all factors
    Kept("factors, first and second moments", "T", 3, "the state"),
    Kept("the same before the last update", "T", 3, "guard.py: the last state known to be sound"),
)
UPDATE = (
    Kept("gradients", "T", 1, "of the whole update"),
    Kept("new factors and moments", "T", 3, "MLX changes no array, it makes new ones"),
    Kept("terms of Adam's sums", "T", 7, "eager arithmetic on whole vectors"),
)
CHECKPOINTED_BLOCK = (Kept("x, before the block", "D", 1, "where recomputing starts"),)
# How many blocks' worth a backward pass works with at once, and Adam's 7 above, are measured, not derived.
WORKING_BLOCKS = 1.0
RECOMPUTED_BLOCKS = 2.2


@dataclass(frozen=True)
class Shapes:
    """What the numbers of a step follow from."""

    config: ModelConfig
    rank: int
    rows: int  # of the largest batch
    tokens: int  # a row
    seen: int  # positions that a target depends on
    targets: int  # positions that the head reads
    dtype: str = "float32"
    checkpointed: bool = False

    @property
    def positions(self) -> int:
        return self.rows * self.tokens

    @property
    def trained_numbers(self) -> int:
        shapes = linear_shapes(self.config).values()
        return self.config.num_hidden_layers * self.rank * sum(i + o for i, o in shapes)

    @property
    def base_numbers(self) -> int:
        c = self.config
        linears = sum(i * o for i, o in linear_shapes(c).values())
        tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        norms = c.hidden_size * (2 * c.num_hidden_layers + 1)
        return tables + c.num_hidden_layers * linears + norms

    @property
    def sizes(self) -> dict[str, int]:
        c = self.config
        return {
            "D": c.hidden_size,
            "Q": c.num_attention_heads * c.head_dim,
            "G": c.num_key_value_heads * c.head_dim,
            "H": c.num_attention_heads,
            "S": self.tokens,
            "F": c.intermediate_size,
            "V": c.vocab_size,
            "R": self.rank,
            "T": self.trained_numbers,
            "1": 1,
        }


@dataclass(frozen=True)
class Budget:
    """Bytes at the peak, by where they are."""

    base: int
    trained: int
    blocks: int  # kept for the backward pass
    working: int  # of the backward pass itself, the head's logits included
    update: int

    @property
    def peak_bytes(self) -> int:
        return self.base + self.trained + max(self.blocks + self.working, self.update)


def numbers(table: tuple[Kept, ...], sizes: dict[str, int]) -> float:
    return sum(kept.count * prod(sizes[axis] for axis in kept.axes) for kept in table)


def kept_of_a_block(shapes: Shapes, after: int) -> float:
    """Bytes; what comes after attention is kept of `after` positions."""
    parts = ((ATTENTION, shapes.positions), (BEFORE, shapes.seen), (AFTER, after))
    return BYTES[shapes.dtype] * sum(num * numbers(table, shapes.sizes) for table, num in parts)


def budget_of(shapes: Shapes) -> Budget:
    sizes, width, L = shapes.sizes, BYTES[shapes.dtype], shapes.config.num_hidden_layers
    block, last = (kept_of_a_block(shapes, after) for after in (shapes.seen, shapes.targets))
    inputs = L * width * shapes.seen * numbers(CHECKPOINTED_BLOCK, sizes)
    head = width * min(shapes.targets, CHUNK_LOGITS // shapes.config.vocab_size) * numbers(HEAD, sizes)
    backward = block * (RECOMPUTED_BLOCKS if shapes.checkpointed else WORKING_BLOCKS)
    return Budget(
        base=width * shapes.base_numbers,
        trained=int(4 * numbers(TRAINED, sizes)),  # factors are float32 whatever the base is
        blocks=int(inputs if shapes.checkpointed else (L - 1) * block + last),
        working=int(max(head, backward)),
        update=int(4 * numbers(UPDATE, sizes)),
    )
