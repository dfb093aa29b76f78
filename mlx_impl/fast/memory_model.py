"""How much memory a step, an evaluation and an answer need, from the shapes of what they read.

Of B rows, T wide, of which U positions are computed outside of attention (`kept_positions.py`), in bytes:

    training     = weights + state + max(kept + gradients + in full + work, kept + 5 logits + head, update)
    kept         = L blocks;  checkpointed: L hidden states and one block
    block        = U (4 D + 3 H K + 2 G K + 3 F + more) itemsize + scores
    scores       = B H T S itemsize on a CPU, on Metal, and where a window is narrower than the row;
                   else 0: CUDA's fused attention keeps none; in a band (band.py) S is two windows.
                   Many of causal rows on a CPU are computed in blocks and not kept (query_blocks.py)
                   Packed examples are B rows of their own, T wide, in groups (segments.py)
    work         = 2 scores + mask + one block without its scores
    evaluation   = weights + state + max(rest + max(3 scores + mask + 2 U F, 5 U F) + in full,
                                         5 logits + head)
    rest         = U (4 D + 3 H K + 2 G K) itemsize
    an answer    = an evaluation of the prompt + both copies of the key/value cache

L is the number of blocks; the other letters are those of the shape names. `logits` are those of one chunk of
the loss; on the plain path those of every position. `more` is what linears keep beside their inputs: what
dropout left of them, DoRA's directions. The state is the moments, and the factors and moments of the update
before, which `guard.py` keeps: 5 numbers beside each factor. An update makes three new ones.

`in full` are arrays as large as a weight. MLX's CPU backend allocates about ten operations ahead of what it
computes, so that a product holds its own unpacked weight and those of the next two. DoRA also holds the
squares of weights; on a GPU its update and the stretched weight too. On the plain path a step keeps every
unpacked weight of DoRA. How many there are at once is measured (IN_FULL, PLAIN_IN_FULL).
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
from . import ops, query_blocks
from .band import pays as band_pays
from .head import CHUNK_LOGITS, head_module
from .kept_positions import kept_of
from .key_blocks import whole_blocks
from .low_rank import low_rank_of
from .packed import packed_of
from .reading import part_width
from .segments import Group, examples_apart

STATE = 5  # numbers beside each factor: two moments, and the factor and its moments of the update before
UPDATE = 11  # more during an update: the gradient, the new factor and moments, intermediate results of Adam
LOGITS = 5  # arrays as large as the logits of one chunk
# Arrays as large as a weight, by whether weights are quantized and whether it is DoRA: in an evaluation
# before there are moments, in a later one, in training.
IN_FULL = {(True, False): (3, 3, 3), (False, True): (3, 3, 3), (True, True): (6, 5, 3)}
DORA_IN_FULL_ON_A_GPU = {(False, True): (6, 6, 6), (True, True): (9, 7, 7)}  # where V is formed
PLAIN_IN_FULL = {(False, True): (7, 6, 7), (True, True): (14, 9, 0)}
QUERY_BLOCKS = 2  # of scores at once: a CPU allocates those of the next one too
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
    more: int  # numbers a position of a block that linears keep under dropout or DoRA
    unpacked: int  # bytes of arrays as large as a weight, in training
    head: int  # bytes of a quantized head in full
    keeps_scores: bool  # attention on a CPU
    unfused: bool = False  # a GPU whose attention keeps them too, in training
    plain: bool = False  # the pattern alone, without unpadding and chunked cross-entropy
    evaluated: tuple[int, int] = (0, 0)  # as `unpacked`, in an evaluation: before there are moments, later

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
    groups: tuple[Group, ...] = ()  # of packed examples: the rows of attention
    masks: int = 1  # of the plain path: one for all rows, or of packed rows one each

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
        has_direction = isinstance(layer, DoRALinear) or low_rank_of(layer) is None
        more += num_out if has_direction else 0  # of DoRA its direction
    trained = sum(array.size for _, array in tree_flatten(model.trainable_parameters())) if layers else 0
    num_blocks = model.config.num_hidden_layers
    weights = sum(array.nbytes for array in arrays)
    keeps_scores = not ops.on_gpu()
    more = more // num_blocks + PLAIN_MORE * model.config.intermediate_size * plain
    first, later, unpacked, head = (itemsize * number for number in numbers_in_full(model, plain))
    unfused = not keeps_scores and mx.metal.is_available()  # MLX's ScaledDotProductAttention::use_fallback
    return Sizes(
        config=model.config,
        weights=weights,
        trained=trained,
        itemsize=itemsize,
        more=more,
        unpacked=unpacked,
        head=head,
        keeps_scores=keeps_scores,
        unfused=unfused,
        plain=plain,
        evaluated=(first, later),
    )


def numbers_in_full(model: CausalLM, plain: bool) -> tuple[int, int, int, int]:
    """Numbers of weights in full and of arrays as large, as in IN_FULL; and those of a packed head."""
    layers = list(lora_layers(model).values())
    largest = max((prod(shape_OI(layer.linear)) for layer in layers), default=0)
    quantized = [layer for layer in layers if "scales" in layer.linear]
    kind = bool(quantized), any(isinstance(layer, DoRALinear) for layer in layers)
    counts = PLAIN_IN_FULL if plain else IN_FULL | (DORA_IN_FULL_ON_A_GPU if ops.on_gpu() else {})
    first, later, trained = (largest * count for count in counts.get(kind, (0, 0, 0)))
    if not plain:
        is_packed = packed_of(head_module(model)) is not None
        return first, later, trained, model.config.vocab_size * model.config.hidden_size * is_packed
    kept = sum(prod(shape_OI(layer.linear)) for layer in quantized if isinstance(layer, DoRALinear))
    return first, later, max(kept, trained), 0


def shape_of(batch: Batch) -> Shape:
    (rows, width), groups = batch.inputs_BT.shape, list[Group]()
    apart = batch
    if batch.segment_BT is not None:
        apart, groups = examples_apart(batch)
    kept = kept_of(apart, groups)
    computed = apart.inputs_BT.size if kept is None else len(kept.kept_U)
    masks = rows if groups else 1
    return Shape(rows, width, computed, int(batch.mask_BT.sum()), groups=tuple(groups), masks=masks)


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
    backward = kept + gradients + sizes.unpacked + work
    of_head = kept + head_bytes(sizes, shape) + packed_head_bytes(sizes)
    update = UPDATE * FLOAT * sizes.trained
    return sizes.weights + state_bytes(sizes) + max(backward, of_head, update)


def evaluation_bytes(sizes: Sizes, shape: Shape) -> int:
    """The most that the loss over this batch holds at once: of the blocks one at a time."""
    shape = computed_shape(sizes, shape)
    c, scores = sizes.config, scores_bytes(sizes, shape, at_once=True)
    a_unit = shape.computed * sizes.itemsize
    rest = a_unit * (sizes.a_position - sizes.more - 3 * c.intermediate_size)
    copies, logits = (1, PLAIN_EVALUATED_LOGITS) if sizes.plain else (3, None)
    attention = copies * scores * FLOAT // sizes.itemsize + mask_bytes(sizes, shape)
    first, later = sizes.evaluated
    of_block = rest + max(attention + 2 * a_unit * c.intermediate_size, 5 * a_unit * c.intermediate_size)
    of_head = head_bytes(sizes, shape, logits) + packed_head_bytes(sizes)
    state = state_bytes(sizes)
    return sizes.weights + max(of_block + first, of_block + state + later, of_head + state)


def answer_bytes(sizes: Sizes, prompts: Shape, max_tokens: int) -> int:
    """Of reading the prompts and then writing so many tokens: a longer cache is a new one beside the old.

    A prompt is read without a band: with a window too, its queries have scores for every key.
    """
    c = replace(sizes.config, sliding_window=None)
    sizes = replace(sizes, config=c)
    a_token = 2 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers * sizes.itemsize
    cache = 2 * prompts.rows * whole_blocks(prompts.keys + max_tokens) * a_token
    width = min(prompts.width, part_width(prompts.rows))  # a long prompt is read in parts
    part = replace(prompts, width=width, computed=prompts.rows * width, seen=prompts.keys - width)
    return evaluation_bytes(sizes, part) + cache


def computed_shape(sizes: Sizes, shape: Shape) -> Shape:
    """The plain path computes every position, and the head at each."""
    return replace(shape, computed=shape.positions, targets=shape.positions) if sizes.plain else shape


def state_bytes(sizes: Sizes) -> int:
    return STATE * FLOAT * sizes.trained


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


def work_bytes(sizes: Sizes, shape: Shape) -> int:
    """What the backward pass of one block works with beside what is kept."""
    kept, scores = scores_bytes(sizes, shape), scores_bytes(sizes, shape, at_once=True)
    block = block_bytes(sizes, shape) - kept
    return scores - kept + 2 * scores * FLOAT // sizes.itemsize + mask_bytes(sizes, shape) + block


def packed_head_bytes(sizes: Sizes) -> int:
    """The head in full, while the last linear's weights still are."""
    return sizes.head + sizes.unpacked // 3 if sizes.head else 0


def mask_bytes(sizes: Sizes, shape: Shape) -> int:
    """Booleans, the bias made of them, and its gradient."""
    masks, heads, pairs = shape.masks if sizes.plain else 1, sizes.config.num_attention_heads, 0
    for rows, width in rows_of(sizes, shape):
        of_row = width * keys_of(sizes, width, shape.seen)
        in_blocks = in_query_blocks(sizes, shape, heads * rows * of_row)
        pairs += query_blocks.MAX_SCORES // (heads * rows) if in_blocks else of_row
    return 6 * masks * pairs if sizes.keeps_scores else 0


def head_bytes(sizes: Sizes, shape: Shape, plain_copies: float | None = None) -> int:
    """Logits, masked, shifted, exponentials, gradient: of one chunk, or on a CPU of the next ones too."""
    logits = shape.targets * sizes.config.vocab_size
    if sizes.plain:
        return int((plain_copies or PLAIN_LOGITS) * FLOAT * logits)
    chunks = 1.84 if sizes.keeps_scores else 0.8
    return int(LOGITS * FLOAT * min(logits, chunks * CHUNK_LOGITS))
