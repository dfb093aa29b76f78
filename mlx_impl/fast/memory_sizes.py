"""What the need of memory depends on: the sizes of a model, and the shape of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import ModelConfig
from ..data import Batch
from ..lora import DoRALinear, LoRALinear, lora_layers
from ..model import CausalLM
from ..targets import shape_OI
from . import ops
from .kept_positions import kept_of
from .low_rank import low_rank_of
from .memory_in_full import numbers_in_full
from .memory_linears import FLOAT, sizes_on_a_cpu
from .segments import SubBatch, examples_apart

PLAIN_MORE = 3  # of the plain path: numbers a position and feature that silu keeps


@dataclass(frozen=True)
class Sizes:
    """What a model brings: bytes, and numbers a position."""

    config: ModelConfig
    weights: int  # bytes of all parameters, the factors too
    trained: int  # numbers
    itemsize: int  # of a hidden state
    more: int  # numbers a position of a block that not every model keeps: `sizes_of`
    unpacked: int  # bytes of arrays as large as a weight, in training
    head: int  # bytes of a quantized head in full
    keeps_scores: bool  # attention on a CPU
    unfused: bool = False  # a GPU whose attention keeps them too, in training
    plain: bool = False  # the pattern alone, without unpadding and chunked cross-entropy
    evaluated: tuple[int, int] = (0, 0)  # as `unpacked`, in an evaluation: before there are moments, later
    # What `memory_cpu.py` counts with.
    more_after: int = 0  # of `more`, those of the linears after attention
    ranks: int = 0  # of the linears of a block, together
    largest: int = 0  # numbers of the largest adapted weight
    is_packed: bool = False
    is_dora: bool = False
    drops: bool = False
    is_partial: bool = False  # some linears have no adapter
    below: int = 0  # blocks below the first one with an adapter

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
    sub_batches: tuple[SubBatch, ...] = ()  # of packed examples: the rows of attention
    masks: int = 1  # of the plain path: one for all rows, or of packed rows one each

    @property
    def positions(self) -> int:
        return self.rows * self.width

    @property
    def keys(self) -> int:
        return self.seen + self.width


def sizes_of(model: CausalLM, plain: bool = False) -> Sizes:
    named = lora_layers(model)
    layers = named.values()
    arrays = [array for _, array in tree_flatten(model.parameters())]
    itemsize = model.model.norm.weight.itemsize
    trained = sum(array.size for _, array in tree_flatten(model.trainable_parameters())) if layers else 0
    num_blocks = model.config.num_hidden_layers
    weights = sum(array.nbytes for array in arrays)
    keeps_scores = not ops.on_gpu()
    more = more_of(layers) // num_blocks + PLAIN_MORE * model.config.intermediate_size * plain
    if model.config.qk_norm:
        more += (model.config.num_attention_heads + model.config.num_key_value_heads) * model.config.head_dim
    if keeps_scores and itemsize < FLOAT:
        more += 2 * model.config.hidden_size  # the norms of MLX's CPU backend keep x in float32
    on_a_cpu = {} if plain or not keeps_scores else sizes_on_a_cpu(named, model.config, itemsize)
    first, later, unpacked, head = (itemsize * number for number in numbers_in_full(model, plain))
    unfused = not keeps_scores and not is_fused_in_training(model.config.head_dim, itemsize)
    return Sizes(
        config=model.config,
        weights=weights,
        trained=trained,
        itemsize=itemsize,
        more=on_a_cpu.pop("more", more),
        unpacked=unpacked,
        head=head,
        keeps_scores=keeps_scores,
        unfused=unfused,
        plain=plain,
        evaluated=(first, later),
        **on_a_cpu,
    )


def more_of(layers: Iterable[LoRALinear]) -> int:
    """Numbers a position that linears keep beside their inputs."""
    more = 0
    for layer in layers:
        num_out, num_in = shape_OI(layer.linear)
        more += num_in if layer.dropout.p > 0 else 0  # what dropout left of the input
        has_direction = isinstance(layer, DoRALinear) or low_rank_of(layer) is None
        more += num_out if has_direction else 0  # of DoRA its direction
    return more


def is_fused_in_training(head_dim: int, itemsize: int) -> bool:
    """Whether a GPU's attention keeps no scores for the gradient: `use_fallback` in MLX's backends."""
    return not mx.metal.is_available() and itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128


def shape_of(batch: Batch) -> Shape:
    (rows, width), sub_batches = batch.inputs_BT.shape, list[SubBatch]()
    apart = batch
    if batch.segment_BT is not None:
        apart, sub_batches = examples_apart(batch)
    kept = kept_of(apart, sub_batches)
    computed = apart.inputs_BT.size if kept is None else len(kept.kept_U)
    masks = rows if sub_batches else 1
    return Shape(rows, width, computed, int(batch.mask_BT.sum()), sub_batches=tuple(sub_batches), masks=masks)
