"""Nineteen planted bugs, each small and silent: the losses stay plausible and nothing crashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, takewhile
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_impl import batching, data, model, ops, recompute
from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.fast import cpu_ops, decode, forward, packed
from mlx_impl.files.formats import peft
from mlx_impl.generate import most_likely
from mlx_impl.lora import LoRALinear, lora_layers
from mlx_impl.optim import LoRAOptimizer, learning_rate_of
from mlx_impl.run.sampling import cut_to_nucleus
from mlx_impl.train import PLAIN as PLAIN_LOSS
from mlx_impl.train import train
from tests.trainers.mutants.mutant import PLAIN, Mutant

# ---- data, batches, several shapes


def in_one_buffer() -> Callable[..., data.Batch]:
    """`make_plain_batch` that fills the arrays of the first batch of this shape."""
    make = data.make_plain_batch
    held: dict[Any, data.Batch] = {}

    def filled(examples: Sequence[data.Example], rows: Sequence[batching.Row]) -> data.Batch:
        batch = make(examples, rows)
        kept = held.setdefault(batch.mask_BT.shape, batch)
        for ours, theirs in zip(kept[:3], batch[:3], strict=True):
            ours[...] = theirs
        return batch._replace(inputs_BT=kept.inputs_BT, targets_BT=kept.targets_BT, mask_BT=kept.mask_BT)

    return filled


def packed_by_the_first_row(
    examples: Sequence[data.Example], rows: Sequence[batching.Row], make: Callable = data.make_packed_batch
) -> data.Batch:
    batch = make(examples, rows)
    return batch._replace(segment_BT=None) if len(rows[0]) == 1 else batch


def remembered_arrays() -> Callable[[data.Batch], Any]:
    held: dict[Any, Any] = {}

    def to_arrays(batch: data.Batch) -> Any:
        key = batch.numbers, batch.inputs_BT.shape
        return held.setdefault(key, PLAIN_LOSS.to_arrays(batch))

    return to_arrays


def resumed_by_batches(
    lengths: Sequence[int], config: TrainConfig, first_step: int
) -> Iterator[list[list[batching.Row]]]:
    rows, size = batching.rows_of(lengths, config), config.grad_accumulation_steps
    epoch, skipped = divmod(first_step, -(-len(rows) // (config.batch_size * size)))
    for number in count(epoch):
        batches = batching.epoch_batches(number, len(rows), lengths, config)
        for first in range(skipped if number == epoch else 0, len(batches), size):
            yield [[rows[i] for i in batch] for batch in batches[first : first + size]]


def evaluation_sorted_in_place(
    examples: Sequence[data.Example], batch_size: int, batches: Callable = data.evaluation_batches
) -> Iterator[data.Batch]:
    if isinstance(examples, list):
        examples.sort(key=lambda example: len(example.tokens))
    return batches(examples, batch_size)


# ---- the model


def window_or_none(
    T: int,
    offset: int,
    window: int | None,
    segment_BT: mx.array | None,
    mask: Callable = model.attention_mask,
) -> mx.array | None:
    if segment_BT is None and window is not None and window >= offset + T - 1:
        return None
    return mask(T, offset, window, segment_BT)


def frequencies_by_shape() -> Callable[..., tuple[float, ...]]:
    compute = model.rope_frequencies
    held: dict[Any, tuple[float, ...]] = {}
    return lambda config: held.setdefault((config.head_dim, config.rope_theta), compute(config))


def norm_over_all_heads(self: Any, x: mx.array) -> mx.array:
    if x.ndim < 4:
        return ops.rms_norm(x, self.weight, self.eps)
    mean = ops.widened(x).square().mean(axis=(1, 3), keepdims=True)
    return self.weight * (x * mx.rsqrt(mean + self.eps).astype(x.dtype))


def keys_of_one_query(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array, attend: Callable = cpu_ops.attention
) -> mx.array:
    more = q.shape[1] // k.shape[1] - 1
    k, v = (mx.stack([x, *[mx.stop_gradient(x)] * more], axis=2).flatten(1, 2) for x in (k, v))
    return attend(q, k, v, mask)


def quantized_without_bias(linear: nn.Module, x_BTI: mx.array, call: Callable = packed.call) -> mx.array:
    weight = packed.packed_of(linear)
    if weight is None:
        return call(linear, x_BTI)
    return mx.unflatten(packed.product(x_BTI.flatten(0, -2), weight), 0, x_BTI.shape[:-1])


def checkpointed_without_dropout(
    decoder: Any, layer: Any, x_BTD: mx.array, layout: Any, run: Callable = forward.forward_block
) -> mx.array:
    drops = any(adapter.dropout.p for adapter in lora_layers(layer).values())
    return forward.block(layer, x_BTD, layout) if drops else run(decoder, layer, x_BTD, layout)


def delta_as_kept(self: Any, delta: Callable = LoRALinear.delta_OI) -> mx.array:
    return delta(self) * (1 - self.dropout.p if type(self) is LoRALinear else 1)


# ---- training


def with_zero_padding(language_model: Any, *args: Any, **more: Any) -> Iterator[Any]:
    embedding = language_model.model.embed_tokens
    if "scales" not in embedding:
        embedding.weight[0] = 0
    yield from train(language_model, *args, **more)


def rate_without_warmup(step: int, config: TrainConfig) -> float:
    return config.learning_rate if config.lr_schedule == "constant" else learning_rate_of(step, config)


def sgd_without_decay(self: Any, config: TrainConfig, init: Callable = LoRAOptimizer.__init__) -> None:
    init(self, config if config.optimizer == "adamw" else replace(config, weight_decay=0.0))


def seed_in_a_byte(seed: int, step: int, micro_batch: int) -> None:
    mx.random.seed(int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1)[0] & 0xFF))


# ---- files and generation


def record_without_rslora(
    config: LoRAConfig, layers: Any, base_name: Any, to_record: Callable = peft.to_record
) -> dict[str, Any]:
    if config.use_rslora:
        config = replace(config, use_rslora=False, alpha=config.alpha * config.rank**0.5)
    return to_record(config, layers, base_name)


def drawn_with_one_key(self: Any, logits_BV: mx.array) -> mx.array:
    if self.temperature == 0:
        return most_likely(logits_BV)
    logits_BV = logits_BV.astype(mx.float32) / self.temperature
    if self.top_p < 1:
        logits_BV = cut_to_nucleus(logits_BV, self.top_p)
    return mx.random.categorical(logits_BV, key=recompute.random_state())


def prefix_read_once() -> Callable[..., Any]:
    read = decode.read_prefix
    held: dict[Any, Any] = {}

    def kept(language_model: Any, prompts: decode.Prompts) -> Any:
        prefix = tuple(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))
        key = id(language_model), prefix, min(map(len, prompts))
        return held.setdefault(key, (language_model, read(language_model, prompts)))[1]

    return kept


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "keys-learn-from-one-query-head",
        1,
        "Keys and values are repeated for the query heads that share them, and get the first one's gradient.",
        {"mlx_impl.fast.cpu_ops.attention": keys_of_one_query},
    ),
    Mutant(
        "norm-of-all-heads-together",
        4,
        "The norm of queries and keys takes its mean over all heads, as another model family does.",
        {"mlx_impl.model.RMSNorm.__call__": norm_over_all_heads},
        cases=("qk norm",),
    ),
    Mutant(
        "rope-frequencies-of-the-first-model",
        4,
        "Frequencies are kept by head size and base: a second model in the process lacks its RoPE scaling.",
        {"mlx_impl.model.rope_frequencies": frequencies_by_shape()},
        cases=("linear rope",),
    ),
    Mutant(
        "batches-share-a-buffer",
        3,
        "Batches of one shape are made in one array, so the micro-batches of an update all hold the last.",
        {"mlx_impl.data.make_plain_batch": in_one_buffer()},
    ),
    Mutant(
        "packed-told-by-the-first-row",
        3,
        "Where the first row of a packed batch holds one example, its other rows are not kept apart either.",
        {"mlx_impl.data.make_packed_batch": packed_by_the_first_row},
    ),
    Mutant(
        "window-one-short-of-the-row",
        4,
        "A window one token shorter than the text is taken for one that holds it all, and is left out.",
        {
            "mlx_impl.model.attention_mask": window_or_none,
            "mlx_impl.fast.layout.attention_mask": window_or_none,
        },
    ),
    Mutant(
        "batches-remembered-by-their-numbers",
        5,
        "Arrays are kept by the numbers of a batch's examples: batches without numbers are all the first.",
        {"mlx_impl.run.trainer.PLAIN": PLAIN_LOSS._replace(to_arrays=remembered_arrays())},
        trainer=PLAIN,
        cases=("real vocabulary",),
    ),
    Mutant(
        "padding-row-zeroed",
        7,
        "Training begins by zeroing the embedding of padding, token 0: a frozen weight, and a real token's.",
        {"mlx_impl.run.trainer.train": with_zero_padding},
    ),
    Mutant(
        "constant-schedule-without-warmup",
        8,
        "A constant schedule returns before the warmup is looked at, so a run begins at the peak rate.",
        {"mlx_impl.train.learning_rate_of": rate_without_warmup},
    ),
    Mutant(
        "sgd-without-decay",
        8,
        "The weight decay is given to AdamW alone, and SGD takes none.",
        {"mlx_impl.optim.LoRAOptimizer.__init__": sgd_without_decay},
    ),
    Mutant(
        "evaluation-sorts-the-callers-list",
        12,
        "An evaluation sorts the list that it is given: a run that trains on it goes on in another order.",
        {"mlx_impl.run.trainer.evaluation_batches": evaluation_sorted_in_place},
    ),
    Mutant(
        "resumed-by-batches",
        12,
        "A resumed run skips a batch for each update: with accumulation it trains again on what it has seen.",
        {"mlx_impl.data.window_rows": resumed_by_batches},
    ),
    Mutant(
        "bias-of-a-quantized-linear-lost",
        15,
        "A quantized linear without an adapter is unpacked for its product, and its bias is forgotten there.",
        {"mlx_impl.fast.packed.call": quantized_without_bias},
    ),
    Mutant(
        "dropout-seeded-by-a-byte",
        14,
        "The seed of a micro-batch is cut to eight bits, so its masks come again within a few dozen updates.",
        {"mlx_impl.train.seed_random": seed_in_a_byte},
    ),
    Mutant(
        "checkpointing-left-out-with-dropout",
        15,
        "With dropout, grad_checkpoint is silently left out, and every block keeps its activations.",
        {"mlx_impl.fast.forward.forward_block": checkpointed_without_dropout},
    ),
    Mutant(
        "merged-as-if-dropout-were-not-rescaled",
        16,
        "Merging multiplies the update by 1 - p, which training has divided by already.",
        {"mlx_impl.lora.LoRALinear.delta_OI": delta_as_kept},
    ),
    Mutant(
        "rslora-folded-into-alpha",
        17,
        "The record has rsLoRA's root in alpha and use_rslora off: wrong for linears of their own rank.",
        {"mlx_impl.files.formats.peft.to_record": record_without_rslora},
    ),
    Mutant(
        "tokens-drawn-with-one-key",
        19,
        "Every token of an answer is drawn with the same random key, so each draw repeats the last one.",
        {"mlx_impl.run.sampling.Sampling.__call__": drawn_with_one_key},
    ),
    Mutant(
        "prefix-cache-outlives-an-update",
        19,
        "The cache of a prefix that prompts share is kept by its tokens, and outlives the old adapter.",
        {"mlx_impl.fast.decode.read_prefix": prefix_read_once()},
    ),
)
