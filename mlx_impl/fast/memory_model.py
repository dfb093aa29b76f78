"""How much memory a step, an evaluation and an answer need, from the shapes of what they read.

Of B rows, T wide, of which U positions are computed outside of attention (`kept_positions.py`), in bytes:

    training     = weights + state + max(kept + work, update)
    kept         = L blocks;  checkpointed: L hidden states and one block
    block        = U (4 D + 3 H K + 2 G K + 3 F + more) itemsize + scores
    scores       = B H T S itemsize on a CPU, on Metal, and where a window is narrower than the row;
                   else 0: CUDA's fused attention keeps none
    work         = max(2 scores + mask + one block without its scores, 4 logits + a packed head in full)
    evaluation   = weights + state + max(rest + max(3 scores + mask + 2 U F, 5 U F), 4 logits + head)
    rest         = U (4 D + 3 H K + 2 G K) itemsize
    an answer    = an evaluation of the prompt + both copies of the key/value cache

L is the number of blocks; the other letters are those of the shape names. `logits` are those of one chunk of
the loss; on the plain path those of every position. `more` is what linears keep that `projection.py` does not
compute: inputs after dropout, DoRA's directions. The state is the factors and moments of now and of the two
updates before, which `guard.py` keeps; an update makes new ones. A step also holds gradients, and quantized
weights in full: on a CPU one at a time, on a GPU or the plain path those of DoRA. Some constants are
measured.
tests/units/test_memory_bytes.py holds the estimate to a band around MLX's own peak, which includes work that
MLX queues ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import ModelConfig
from ..data import Batch
from ..lora import DoRALinear, lora_layers
from ..model import CausalLM
from ..targets import shape_OI
from . import ops
from .head import CHUNK_LOGITS, head_module
from .kept_positions import kept_positions
from .packed import packed_of, unpacks_first
from .projection import low_rank_of

STATES = 3  # copies of factors and moments: the new one, and the two that guard.py knows
UPDATE = 6  # extra numbers per trained number during an update: intermediate results of Adam
PLAIN_MORE = 3  # of the plain path: numbers a position and feature that silu keeps
PLAIN_LOGITS, PLAIN_EVALUATED_LOGITS = 6.5, 2.5  # arrays as large as all logits
FLOAT = 4  # bytes of what is float32 whatever the model's type is


@dataclass(frozen=True)
class Sizes:
    """What a model brings: bytes, and numbers a position."""

    config: ModelConfig
    weights: int  # bytes of all parameters, the factors too
    trained: int  # numbers
    itemsize: int  # of a hidden state
    more: int  # numbers a position of a block that only unfused linears keep
    unpacked: int  # bytes of quantized linears in full, beside the stored ones
    head: int  # bytes of a quantized head in full
    keeps_scores: bool  # attention on a CPU
    unfused: bool = False  # a GPU whose attention keeps them too, in training
    plain: bool = False  # the pattern alone, without unpadding and chunked cross-entropy

    @property
    def a_position(self) -> int:
        """Numbers that a block keeps: x and its norm, twice; q, the mix, both orders; k, v; the gate's."""
        c = self.config
        queries, keys = (c.head_dim * n for n in (c.num_attention_heads, c.num_key_value_heads))
        return 4 * c.hidden_size + 3 * queries + 2 * keys + 3 * c.intermediate_size + self.more


@dataclass(frozen=True)
class Shape:
    """Of one batch."""

    rows: int
    width: int  # of a row, with padding
    computed: int  # positions outside of attention
    targets: int  # positions that the head reads
    seen: int = 0  # tokens in the cache before these
    masks: int = 1  # of attention: one for all rows, or of packed rows one each

    @property
    def positions(self) -> int:
        return self.rows * self.width

    @property
    def keys(self) -> int:
        return self.seen + self.width


def sizes_of(model: CausalLM, plain: bool = False) -> Sizes:
    layers = lora_layers(model).values()
    arrays = [array for _, array in tree_flatten(model.parameters())]
    itemsize = model.model.norm.weight.itemsize
    more = 0
    for layer in layers:
        num_out, num_in = shape_OI(layer.linear)
        more += num_in if layer.dropout.p > 0 else 0  # what dropout left of the input
        more += num_out if low_rank_of(layer) is None else 0
        more += num_out if isinstance(layer, DoRALinear) else 0
    trained = sum(array.size for _, array in tree_flatten(model.trainable_parameters())) if layers else 0
    num_blocks = model.config.num_hidden_layers
    weights = sum(array.nbytes for array in arrays)
    keeps_scores = not ops.on_gpu()
    more = more // num_blocks + PLAIN_MORE * model.config.intermediate_size * plain
    unpacked, head = (itemsize * number for number in unpacked_numbers(model, plain))
    unfused = not keeps_scores and mx.metal.is_available()  # MLX's ScaledDotProductAttention::use_fallback
    return Sizes(model.config, weights, trained, itemsize, more, unpacked, head, keeps_scores, unfused, plain)


def unpacked_numbers(model: CausalLM, plain: bool) -> tuple[int, int]:
    """How many numbers of quantized weights are in full at once: of adapted linears, and of the head."""
    quantized = [layer for layer in lora_layers(model).values() if "scales" in layer.linear]
    if plain or not unpacks_first():
        return sum(prod(shape_OI(layer.linear)) for layer in quantized if isinstance(layer, DoRALinear)), 0
    is_packed = packed_of(head_module(model)) is not None
    largest = max((prod(shape_OI(layer.linear)) for layer in quantized), default=0)
    return largest, model.config.vocab_size * model.config.hidden_size * is_packed


def shape_of(batch: Batch) -> Shape:
    kept, (rows, width) = kept_positions(batch), batch.inputs_BT.shape
    computed = batch.inputs_BT.size if kept is None else len(kept.kept_U)
    masks = 1 if batch.segment_BT is None else rows
    return Shape(rows, width, computed, int(batch.mask_BT.sum()), masks=masks)


def training_bytes(sizes: Sizes, shape: Shape, checkpointed: bool) -> int:
    """The most that an update of this batch holds at once; the equation is above."""
    shape = computed_shape(sizes, shape)
    num_blocks, block = sizes.config.num_hidden_layers, block_bytes(sizes, shape)
    kept, work = num_blocks * block, work_bytes(sizes, shape)
    if checkpointed:
        at_once = 2 if sizes.plain else 1  # `mx.checkpoint` recomputes some blocks ahead
        kept = num_blocks * shape.computed * sizes.config.hidden_size * sizes.itemsize + at_once * block
        work = max(work, 0 if sizes.keeps_scores else 4 * block)  # measured on a GPU
    gradients = 2 * FLOAT * sizes.trained  # of a batch, and their sum
    return (
        sizes.weights
        + sizes.unpacked
        + state_bytes(sizes)
        + gradients
        + max(kept + work, UPDATE * FLOAT * sizes.trained)
    )


def evaluation_bytes(sizes: Sizes, shape: Shape) -> int:
    """The most that the loss over this batch holds at once: of the blocks one at a time."""
    shape = computed_shape(sizes, shape)
    c, scores = sizes.config, scores_bytes(sizes, shape)
    a_unit = shape.computed * sizes.itemsize
    rest = a_unit * (sizes.a_position - sizes.more - 3 * c.intermediate_size)
    copies, logits = (1, PLAIN_EVALUATED_LOGITS) if sizes.plain else (3, None)
    attention = copies * scores * FLOAT // sizes.itemsize + mask_bytes(sizes, shape)
    of_block = rest + max(attention + 2 * a_unit * c.intermediate_size, 5 * a_unit * c.intermediate_size)
    of_head = head_bytes(sizes, shape, logits) + sizes.head
    return sizes.weights + state_bytes(sizes) + max(of_block, of_head)


def answer_bytes(sizes: Sizes, prompts: Shape, max_tokens: int) -> int:
    """Of reading the prompts and then writing so many tokens: a longer cache is a new one beside the old."""
    c = sizes.config
    a_token = 2 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers * sizes.itemsize
    cache = 2 * prompts.rows * (prompts.keys + max_tokens) * a_token
    return evaluation_bytes(sizes, prompts) + cache


def computed_shape(sizes: Sizes, shape: Shape) -> Shape:
    """The plain path computes every position, and the head at each."""
    return replace(shape, computed=shape.positions, targets=shape.positions) if sizes.plain else shape


def state_bytes(sizes: Sizes) -> int:
    return 3 * STATES * FLOAT * sizes.trained


def block_bytes(sizes: Sizes, shape: Shape) -> int:
    return shape.computed * sizes.a_position * sizes.itemsize + scores_bytes(sizes, shape)


def scores_bytes(sizes: Sizes, shape: Shape) -> int:
    window = sizes.config.sliding_window
    if not (sizes.keeps_scores or sizes.unfused or (window is not None and window < shape.keys)):
        return 0
    return shape.rows * sizes.config.num_attention_heads * shape.width * shape.keys * sizes.itemsize


def work_bytes(sizes: Sizes, shape: Shape) -> int:
    """What one block, or the head, works with beside what is kept."""
    scores = scores_bytes(sizes, shape)
    of_block = (
        2 * scores * FLOAT // sizes.itemsize + mask_bytes(sizes, shape) + block_bytes(sizes, shape) - scores
    )
    return max(of_block, head_bytes(sizes, shape) + sizes.head)


def mask_bytes(sizes: Sizes, shape: Shape) -> int:
    """Booleans, the bias made of them, and its gradient."""
    return 6 * shape.masks * shape.width * shape.keys if sizes.keeps_scores else 0


def head_bytes(sizes: Sizes, shape: Shape, plain_copies: float | None = None) -> int:
    """Logits, shifted, their exponentials, the gradient: of one chunk, or on a CPU of the next ones too."""
    logits = shape.targets * sizes.config.vocab_size
    if sizes.plain:
        return int((plain_copies or PLAIN_LOGITS) * FLOAT * logits)
    chunks = 2.3 if sizes.keeps_scores else 1.0
    return int(4 * FLOAT * min(logits, chunks * CHUNK_LOGITS))
