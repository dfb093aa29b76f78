"""The model FLOPs of a step and the model FLOPs utilization (MFU).

Per position, a matrix of P weights takes 2P FLOPs forward, 2P for the gradient of its input and 2P for its
own gradient: the 6P of Chowdhery et al. 2022, "PaLM", appendix B, which defines the MFU. A frozen matrix
needs no gradient of its own, so a LoRA step takes 4P, and 6P only for the factors. Attention takes PaLM's
12 L H K T, because its inputs are trained. The head counts at targets, the blocks at tokens. Extra work
(padding, recomputation) adds no model FLOPs, only time. A shared prefix counts in every row, even for a
trainer that computes it once, so that all trainers are measured alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_impl.config import ModelConfig
from mlx_impl.data import Batch, Window

MATMUL_SIZES = {False: 1536, True: 8192}  # is it a GPU -> size of the square matrices that measure the rate


@dataclass(frozen=True)
class Work:
    """The work of one update, averaged over a case's updates."""

    num_positions: int  # with padding
    num_tokens: int  # without padding
    num_distinct: int  # tokens that a target depends on, a shared prefix counted once
    num_targets: int
    num_pairs: int  # query-key pairs: the sum of T^2 over rows


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
    """The prefixes of rows that end at or before a target. A hidden state depends on its prefix only."""
    segment_BT = np.zeros_like(batch.inputs_BT) if batch.segment_BT is None else batch.segment_BT
    row_BT2 = np.stack([batch.inputs_BT, segment_BT], axis=-1)
    return {
        row_T2[: t + 1].tobytes()
        for row_T2, mask_T in zip(row_BT2, batch.mask_BT, strict=True)
        for t in range(max(np.flatnonzero(mask_T), default=-1) + 1)
    }


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one update, by part."""

    blocks: int  # 4P of the linears
    factors: int  # 6P of A and B
    attention: int
    head: int  # 4P at the targets
    repeated: int  # the share of blocks and factors that repeats a shared prefix or that no target depends on

    @property
    def total(self) -> int:
        return self.blocks + self.factors + self.attention + self.head


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linears of a block, by name."""
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
    """FLOPs per second of the square matrix multiplication that took `seconds`."""
    return 2.0 * MATMUL_SIZES[is_gpu] ** 3 / seconds


def utilisation(flops: int, seconds: float, rate: float) -> float:
    """MFU = model FLOPs / (seconds * matmul rate)."""
    return flops / (seconds * rate)
