"""Bugs of a trainer that the suite was not built with."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch, Example, make_packed_batch
from mlx_impl.fast.decode import before_stop
from mlx_impl.fast.kept_positions import KeptPositions, kept_positions, shared_prefix_length
from mlx_impl.fast.layout import masks_of
from mlx_impl.fast.vectors import from_tree
from mlx_impl.files.formats.factors import CONFIG, write_files
from mlx_impl.files.quantized import plain_module
from mlx_impl.generate import next_tokens
from mlx_impl.lora import LoRALinear
from mlx_impl.model import attention_mask, rope_frequencies
from mlx_impl.ops import PIECE
from mlx_impl.optim import AdamW, LoRAOptimizer
from mlx_impl.recompute import next_key
from mlx_impl.run.guard import FiniteGuard
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.targets import rank_and_scale, shape_OI
from tests.trainers.mutants.mutant import Mutant

CHECK, EVALUATE = FiniteGuard.check, LoRATrainer.evaluate
INIT_LINEAR, INIT_OPTIMIZER = LoRALinear.__init__, LoRAOptimizer.__init__


def logsumexp_padded_with_zeros(x_NV: mx.array) -> mx.array:
    V = x_NV.shape[-1]
    if V <= PIECE:
        return mx.logsumexp(x_NV, axis=-1)
    padded_NV = mx.pad(x_NV, [(0, 0), (0, -V % PIECE)])
    return logsumexp_padded_with_zeros(mx.logsumexp(mx.unflatten(padded_NV, -1, (-1, PIECE)), axis=-1))


def frequencies_by_wavelengths(config: ModelConfig) -> tuple[float, ...]:
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "linear":
        return rope_frequencies(config)
    blended, low, high = [], scaling.low_freq_factor, scaling.high_freq_factor
    for frequency in rope_frequencies(replace(config, rope_scaling=None)):
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0), 1)
        blended.append(1 / (kept / frequency + (1 - kept) * scaling.factor / frequency))
    return tuple(blended)


def packed_with_a_flag(examples: Sequence[Example], rows: Sequence[tuple[int, ...]]) -> Batch:
    batch: Any = make_packed_batch(examples, rows)
    return batch._replace(segment_BT=np.where(batch.segment_BT < 0, -1, batch.segment_BT % 2))


class DecayAtThePeak(AdamW):
    def __init__(self, learning_rate: float, **more: Any) -> None:
        super().__init__(learning_rate, **more)
        self.peak = learning_rate

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        moved = super().apply_single(gradient, parameter, state)
        return moved + parameter * self.weight_decay * (self.learning_rate - self.peak)


REMEMBERED: dict[Any, KeptPositions | None] = {}


def kept_by_mask(batch: Batch, is_packed: bool) -> KeptPositions | None:
    by_mask = batch.mask_BT.shape, batch.mask_BT.tobytes()
    return REMEMBERED.setdefault(by_mask, kept_positions(batch, is_packed))


def prefix_of_two_rows(batch: Batch, is_needed_BT: np.ndarray) -> int:
    rows: Any = np.flatnonzero(is_needed_BT[:, 0])[[0, -1]] if is_needed_BT[:, 0].any() else []
    segment_BT = None if batch.segment_BT is None else batch.segment_BT[rows]
    two = batch._replace(inputs_BT=batch.inputs_BT[rows], segment_BT=segment_BT)
    return shared_prefix_length(two, is_needed_BT[rows]) if len({*rows}) == 2 else 0


def good_at_once(self: FiniteGuard, window: list[Batch], record: Any) -> None:
    CHECK(self, window, record)
    self.good = (self.updates_done, self.now)


def moments_by_the_layers_name(tree: dict[str, Any], factors: Any) -> dict[str, Any]:
    in_order = sorted(tree_flatten(factors), key=lambda pair: pair[0].split(".")[2])
    return from_tree(tree, dict(in_order))


def evaluate_cut(self: LoRATrainer, examples: Sequence[Example]) -> float:
    size = self.training.max_seq_length
    return EVALUATE(self, [Example(e.tokens[:size], e.is_target[:size]) for e in examples])


def without_a_window_if_packed(T: int, sub_batches: Any, window: int | None) -> Any:
    return masks_of(T, sub_batches, None if sub_batches else window)


def only_b_is_faster(self: LoRAOptimizer, config: TrainConfig) -> None:
    INIT_OPTIMIZER(self, config)
    self.filters[0] = lambda name, _: not name.endswith("lora_b")


def rslora_by_the_common_rank(name: str, config: LoRAConfig) -> tuple[int, float]:
    rank, scale = rank_and_scale(name, config)
    return rank, scale * (rank / config.rank) ** 0.5 if config.use_rslora else scale


def bounded_by_the_words(self: LoRALinear, linear: Any, rank: int, scale: float, dropout: float) -> None:
    INIT_LINEAR(self, linear, rank, scale, dropout)
    self.lora_a = self.lora_a * (shape_OI(linear)[1] / linear.weight.shape[1]) ** 0.5


def dropped_in_256ths(self: Any, x: mx.array) -> mx.array:
    if not self.training or self.p == 0:
        return x
    return x * mx.random.bernoulli(1 - round(self.p * 256) / 256, x.shape, next_key()) / (1 - self.p)


def every_state_kept(self: Any, window: list[Batch], record: Any) -> None:
    CHECK(self, window, record)
    self.history = [*getattr(self, "history", []), (self.updates_done, self.now)]


def quantized_again(linear: Any, weight_OI: mx.array) -> Any:
    if isinstance(linear, nn.QuantizedLinear):
        how = linear.group_size, linear.bits
        weight_OI = mx.dequantize(*mx.quantize(weight_OI, *how), *how)
    return plain_module(linear, weight_OI)


def record_written_once(folder: Path, name: str, tensors: Any, record: dict, metadata: Any) -> None:
    if (folder / CONFIG).exists():
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_files(folder, name, tensors, record, metadata)


def no_mask_for_one_query(T: int, offset: int, window: int | None, segment_BT: Any) -> mx.array | None:
    return None if T == 1 else attention_mask(T, offset, window, segment_BT)


def stopped_by_the_prompt(
    model: Any,
    caches: list,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Collection[int],
    watched: Any,
) -> list[list[int]]:
    texts, shortest = [list(prompt) for prompt in prompts], min(map(len, prompts))
    tokens_BT = mx.array([text[caches[0].num_tokens : shortest] for text in texts])
    for length in range(shortest, max(map(len, prompts)) + max_tokens):
        for text, token in zip(texts, next_tokens(model, tokens_BT, caches).tolist(), strict=True):
            if len(text) == length:
                text.append(token)
        if all(any(token in stop_ids for token in text) for text in texts):
            break
        tokens_BT = mx.array([[text[length]] for text in texts])
    replies = [text[len(p) : len(p) + max_tokens] for text, p in zip(texts, prompts, strict=True)]
    return [before_stop(reply, stop_ids) for reply in replies]


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "llama3-blends-wavelengths",
        4,
        "Between its two bands Llama 3 blends frequencies; here wavelengths are, as MLX's rope has them.",
        {"mlx_impl.model.rope_frequencies": frequencies_by_wavelengths},
        cases=("llama3 rope",),
    ),
    Mutant(
        "packed-segments-are-a-flag",
        3,
        "A flag that flips from example to example marks a packed row: the third example sees the first.",
        {"mlx_impl.data.make_packed_batch": packed_with_a_flag},
    ),
    Mutant(
        "decay-at-the-peak-rate",
        8,
        "Weight decay is multiplied by the peak learning rate, not by that of the update.",
        {"mlx_impl.optim.AdamW": DecayAtThePeak},
    ),
    Mutant(
        "kept-positions-remembered-by-the-mask",
        5,
        "The positions to compute are kept for the next batch of the same mask, whose rows share no prefix.",
        {"mlx_impl.fast.kept_positions.kept_positions": kept_by_mask},
    ),
    Mutant(
        "checkpointed-blocks-share-a-mask",
        14,
        "After a checkpointed block MLX's random state stays where it was: every block drops the same.",
        {"mlx_impl.recompute.RandomKeys.pass_on": lambda self: None},
    ),
    Mutant(
        "prefix-of-the-first-and-the-last-row",
        5,
        "The common prefix is that of the first and last row, as if rows were sorted: the rest is misread.",
        {"mlx_impl.fast.kept_positions.shared_prefix_length": prefix_of_two_rows},
    ),
    Mutant(
        "good-before-it-is-known",
        12,
        "A state counts as good if the loss before its update was finite: rollback gives the ruined adapter.",
        {"mlx_impl.run.guard.FiniteGuard.check": good_at_once},
    ),
    Mutant(
        "moments-by-the-layers-name",
        12,
        "After a stop the moments are read with layer 10 before layer 2, and go to other layers' factors.",
        {"mlx_impl.fast.vectors.from_tree": moments_by_the_layers_name},
    ),
    Mutant(
        "evaluation-cut-to-a-packed-row",
        12,
        "Evaluation cuts every example to the length of a packed row: only the start of an answer counts.",
        {"mlx_impl.run.trainer.LoRATrainer.evaluate": evaluate_cut},
    ),
    Mutant(
        "window-lost-in-packed-rows",
        5,
        "The mask of packed rows knows segments and causality only: a Mistral attends all of its example.",
        {"mlx_impl.fast.forward.masks_of": without_a_window_if_packed},
        cases=("sliding window",),
    ),
    Mutant(
        "loraplus-without-the-magnitude",
        8,
        "With LoRA+ and DoRA only B learns faster, and the magnitude at the rate of A.",
        {"mlx_impl.optim.LoRAOptimizer.__init__": only_b_is_faster},
        cases=("dora",),
    ),
    Mutant(
        "rslora-by-the-common-rank",
        13,
        "With rsLoRA a linear with a rank of its own is scaled by the square root of the common rank.",
        {"mlx_impl.targets.rank_and_scale": rslora_by_the_common_rank},
    ),
    Mutant(
        "a-bounded-by-the-packed-width",
        15,
        "On a quantized base A's bound comes from the packed columns: at 4 bits A is 2.8 times too large.",
        {"mlx_impl.lora.LoRALinear.__init__": bounded_by_the_words},
    ),
    Mutant(
        "dropout-in-256ths",
        14,
        "The dropout rate is rounded to 256ths, as random bytes have it: a rate of 0.001 drops nothing.",
        {"mlx_impl.lora.Dropout.__call__": dropped_in_256ths},
    ),
    Mutant(
        "every-state-kept",
        15,
        "The guard keeps the state after every update, to go back to any: memory grows until the run ends.",
        {"mlx_impl.run.guard.FiniteGuard.check": every_state_kept},
    ),
    Mutant(
        "record-written-once",
        17,
        "A second adapter saved into a folder keeps the adapter_config.json of the first, with its alpha.",
        {"mlx_impl.files.formats.peft.write_files": record_written_once},
    ),
    Mutant(
        "window-forgotten-by-the-cache",
        19,
        "One new token needs no causal mask, so it gets none: it attends tokens before the sliding window.",
        {"mlx_impl.model.attention_mask": no_mask_for_one_query},
        cases=("sliding window",),
    ),
    Mutant(
        "stopped-by-the-prompt",
        19,
        "Stop tokens are looked for in the whole text: a chat prompt has one, and answers end at once.",
        {"mlx_impl.fast.decode.decode_batch": stopped_by_the_prompt},
    ),
)
