"""How much arithmetic a step needs, and what share of the machine's it gets.

A matrix of P weights takes 2P FLOPs a position forward, and backward 2P for the gradient of its input and
2P for its own: the 6P of Chowdhery et al. 2022, "PaLM", appendix B, which defines the utilisation (MFU). A
frozen matrix needs no gradient of its own, so LoRA's step takes 4P; only the factors take 6. Attention is
PaLM's 12 L H K T a position, since its inputs do train. The head is needed only at targets, the blocks at
tokens. What an implementation does beyond that (padding, recomputing) is no model FLOP, and counts as time;
what it saves because rows begin alike is one all the same, so that all sides are counted alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_impl.config import ModelConfig
from mlx_impl.data import Batch, Window

MATMUL_SIZES = {False: 1536, True: 8192}  # rows and columns of the square that measures the rate; on a GPU?


@dataclass(frozen=True)
class Work:
    """What one update is given, the mean over a case's updates."""

    num_positions: int  # inputs, padding included
    num_tokens: int  # inputs, padding left out
    num_distinct: int  # of these what a target sees, and what several rows begin with once
    num_targets: int
    num_pairs: int  # of a query and a key in one row: the sum of T^2 over rows


def work_of(windows: Sequence[Window]) -> Work:
    batches = [batch for window in windows for batch in window]
    sums = (
        sum(batch.inputs_BT.size for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(len(distinct_histories(batch)) for batch in batches),
        sum(int(batch.mask_BT.sum()) for batch in batches),
        sum(batch.inputs_BT.size * batch.inputs_BT.shape[1] for batch in batches),
    )
    return Work(*(round(total / len(windows)) for total in sums))


def distinct_histories(batch: Batch) -> set[bytes]:
    """Of each slot that a target sees its row up to it: on that alone do its hidden states depend."""
    segment_BT = np.zeros_like(batch.inputs_BT) if batch.segment_BT is None else batch.segment_BT
    row_BT2 = np.stack([batch.inputs_BT, segment_BT], axis=-1)
    return {
        row_T2[: t + 1].tobytes()
        for row_T2, mask_T in zip(row_BT2, batch.mask_BT, strict=True)
        for t in range(max(np.flatnonzero(mask_T), default=-1) + 1)
    }


@dataclass(frozen=True)
class StepFlops:
    """Of one update, by part."""

    blocks: int  # 4P of the linears
    factors: int  # 6P of A and B
    attention: int
    head: int  # 4P at the targets
    repeated: int  # of blocks and factors, what is the same in several rows, or unseen

    @property
    def total(self) -> int:
        return self.blocks + self.factors + self.attention + self.head


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linears of a block."""
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    query, shared = config.num_attention_heads * K, config.num_key_value_heads * K
    return {
        "q_proj": (D, query),
        "k_proj": (D, shared),
        "v_proj": (D, shared),
        "o_proj": (query, D),
        "gate_proj": (D, F),
        "up_proj": (D, F),
        "down_proj": (F, D),
    }


def step_flops(config: ModelConfig, rank: int, work: Work) -> StepFlops:
    shapes = linear_shapes(config).values()
    base = sum(num_in * num_out for num_in, num_out in shapes)
    factors = rank * sum(num_in + num_out for num_in, num_out in shapes)
    L, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    return StepFlops(
        blocks=4 * L * base * work.num_tokens,
        factors=6 * L * factors * work.num_tokens,
        repeated=L * (4 * base + 6 * factors) * (work.num_tokens - work.num_distinct),
        attention=12 * L * width * work.num_pairs,
        head=4 * config.hidden_size * config.vocab_size * work.num_targets,
    )


def matmul_rate(is_gpu: bool, seconds: float) -> float:
    """FLOPs a second of the square multiplication that took so long."""
    return 2.0 * MATMUL_SIZES[is_gpu] ** 3 / seconds


def utilisation(flops: int, seconds: float, rate: float) -> float:
    """MFU: the share of the measured matmul rate that the step's model FLOPs had."""
    return flops / (seconds * rate)
