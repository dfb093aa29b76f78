"""A model of a step's peak memory, computed from its shapes term by term and compared with the allocator.

    peak = base + trained + max(backward, update)
    backward = what L blocks keep + max(the head, the working set of one block's backward pass)
    backward, checkpointed = L inputs + max(the head, one block recomputed and its backward pass), on a CPU
    update   = new factors and moments beside the old ones, gradients, intermediate results

The tables below are the model. They list the tensors that MLX keeps for the backward pass; if a change keeps
other tensors, edit their lines. `python -m benchmarks memory` prints them with the bytes of a case. A tensor
is kept if some gradient needs it: factors need the input of their linear, a product needs both operands, a
norm needs its input. A frozen weight needs no gradient, so the output of a linear is kept only if something
else needs it. Gradient checkpointing (Chen et al. 2016, "Sublinear Memory Cost") keeps only the input of each
block, and one whole block at a time. No term depends on the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mlx_impl.config import ModelConfig

from .flops import linear_shapes

CHUNK_LOGITS = 2**25  # as in mlx_impl, which cannot be imported before the BLAS is loaded; a test compares
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Kept:
    """`count` tensors of prod(`axes`) numbers per position; the axes are letters of `Shapes.sizes`."""

    what: str
    axes: str  # D width, Q all queries, G all keys, H heads, S keys, F ffn, V vocabulary, R rank, 1
    count: float
    why: str


ATTENTION = (  # at every position of a row, padding included
    Kept("q, rotated", "Q", 1, "gradient of k"),
    Kept("k (rotated) and v", "G", 2, "gradients of q and of the attention weights"),
    Kept("attention weights", "HS", 1, "gradients of softmax and v; a fused GPU kernel keeps none"),
)
BEFORE = (  # before attention, at the positions that a target depends on
    Kept("x", "D", 1, "gradient of the norm"),
    Kept("normalized x", "D", 1, "gradient of A in q, k, v"),
    Kept("A x in q, k, v", "R", 3, "gradient of B"),
    Kept("1 / root mean square of x", "1", 1, "gradient of the norm"),
)
AFTER = (  # after attention, at the same positions; in the last block at targets only
    Kept("attention output", "Q", 1, "gradient of A in o"),
    Kept("x", "D", 1, "gradient of the norm"),
    Kept("normalized x", "D", 1, "gradient of A in gate, up"),
    Kept("1 / root mean square of x", "1", 1, "gradient of the norm"),
    Kept("gate and up", "F", 2, "gradients of their product"),
    Kept("sigmoid(gate)", "F", 1, "gradient of silu; recomputed on a GPU"),
    Kept("A x in o, gate, up, down", "R", 4, "gradient of B"),
)
HEAD = (  # at targets, their number rounded up to a shape bucket
    Kept("last hidden state at targets", "D", 1, "input of the head"),
    Kept("its gradient", "D", 1, "formed with the loss, chunk by chunk"),
    Kept("logits, shifted logits, exponentials, gradient", "V", 4, "one chunk: at most 2**25 logits"),
)
TRAINED = (  # copies of all factors
    Kept("factors, first and second moments", "T", 3, "training state"),
    Kept("the same, before the last update", "T", 3, "rollback to the last finite state"),
)
UPDATE = (
    Kept("gradients", "T", 1, "of all factors"),
    Kept("new factors and moments", "T", 3, "MLX arrays are immutable"),
    Kept("intermediate results of Adam", "T", 7, "eager arithmetic on whole vectors"),
)
CHECKPOINTED_BLOCK = (Kept("input of the block", "D", 1, "start of the recomputation"),)
# Fitted to measurements, not derived: the working set of a backward pass in blocks, and Adam's 7 above.
WORKING_BLOCKS = 1.0
RECOMPUTED_BLOCKS = 2.2


@dataclass(frozen=True)
class Shapes:
    """The sizes that determine a step's memory."""

    config: ModelConfig
    rank: int
    rows: int  # of the largest batch
    tokens: int  # per row
    needed: int  # positions that a target depends on, a shared prefix counted once
    targets: int  # positions at which the head is computed
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
    """Bytes at the peak, by part."""

    base: int
    trained: int
    blocks: int  # kept for the backward pass
    working: int  # working set of the backward pass, including the head's logits
    update: int

    @property
    def peak_bytes(self) -> int:
        return self.base + self.trained + max(self.blocks + self.working, self.update)


def numbers(table: tuple[Kept, ...], sizes: dict[str, int]) -> float:
    return sum(kept.count * prod(sizes[axis] for axis in kept.axes) for kept in table)


def kept_of_a_block(shapes: Shapes, after: int) -> float:
    """Bytes kept by one block, with `after` positions computed after attention."""
    parts = ((ATTENTION, shapes.positions), (BEFORE, shapes.needed), (AFTER, after))
    return BYTES[shapes.dtype] * sum(num * numbers(table, shapes.sizes) for table, num in parts)


def budget_of(shapes: Shapes) -> Budget:
    sizes, width, L = shapes.sizes, BYTES[shapes.dtype], shapes.config.num_hidden_layers
    block, last = (kept_of_a_block(shapes, after) for after in (shapes.needed, shapes.targets))
    inputs = L * width * shapes.needed * numbers(CHECKPOINTED_BLOCK, sizes)
    head = width * min(shapes.targets, CHUNK_LOGITS // shapes.config.vocab_size) * numbers(HEAD, sizes)
    backward = block * (RECOMPUTED_BLOCKS if shapes.checkpointed else WORKING_BLOCKS)
    return Budget(
        base=width * shapes.base_numbers,
        trained=int(4 * numbers(TRAINED, sizes)),  # factors are float32 whatever the base is
        blocks=int(inputs if shapes.checkpointed else (L - 1) * block + last),
        working=int(max(head, backward)),
        update=int(4 * numbers(UPDATE, sizes)),
    )
