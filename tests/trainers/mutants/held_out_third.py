"""Planted bugs: each is a small mistake in a copy of the trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_impl.batching import POOL, chunks
from mlx_impl.fast.cpu_ops import PIECE, row_sums
from mlx_impl.fast.forward import block
from mlx_impl.fast.kept_positions import shared_prefix_length
from mlx_impl.fast.projection import project
from mlx_impl.fast.recompute import recomputed
from mlx_impl.fast.unpadding import Unpadding
from mlx_impl.lora import LoRALinear, dense_weight_OI
from mlx_impl.optim import LoRAOptimizer, clip_gradients, learning_rate_of
from mlx_impl.run.trainer import with_targets
from mlx_impl.targets import linears_of_last_blocks, matches_end, of_pattern
from mlx_impl.text.examples import turn_end
from tests.trainers.mutants.mutant import Mutant

# ---- primitives and layers


def row_sums_with_a_tail(x: mx.array) -> mx.array:
    """x[..., -0:] is all of x."""
    size = x.shape[-1]
    if size < PIECE:
        return row_sums(x)
    rest = size % PIECE
    return row_sums(x[..., : size - rest]) + x[..., -rest:].sum(axis=-1, keepdims=True)


def attention_of_the_width(layer: Any, x_BTD: mx.array, layout: Any) -> mx.array:
    q, k, v = (
        layout.split_heads(y_BTO, y_BTO.shape[-1] // layer.head_dim)
        for y_BTO in project(x_BTD, layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if layer.qk_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    q = q * (layer.head_dim / (x_BTD.shape[-1] / q.shape[1])) ** 0.5
    mix_BTO = layout.merge_heads(layout.attend(q, k, v, layer.frequency_P))
    return project(layout.select_targets(mix_BTO), layer.o_proj)[0]


# ---- data


def grouped_in_the_size_of_the_last(
    batches: list[list[int]], lengths: Sequence[int], random: np.random.Generator
) -> list[list[int]]:
    size, sorted_batches = len(batches[-1]), []
    for start in range(0, len(batches), POOL):
        pool = [number for batch in batches[start : start + POOL] for number in batch]
        sorted_batches += chunks(sorted(pool, key=lambda number: lengths[number]), size)
    return [sorted_batches[i] for i in random.permutation(len(sorted_batches))]


def end_of_the_last_turn(turn: Any, tokens: Sequence[int], starts: Sequence[int], stop_ids: Any) -> int:
    end = turn_end(turn, tokens, starts, stop_ids)
    is_last = not any(token in stop_ids for token in tokens[end:])
    return end if is_last or tokens[end - 1] not in stop_ids else end - 1


def read_ahead(windows: Any) -> Iterator[Any]:
    windows = with_targets(windows)
    following = next(windows, None)
    while following is not None:
        window, following = following, next(windows, None)
        yield window


# ---- loss and gradient


def prefix_of_whole_rows(batch: Any, is_needed_BT: np.ndarray) -> int:
    return shared_prefix_length(batch, np.repeat(is_needed_BT[:, :1], is_needed_BT.shape[1], axis=1))


def gather_with_the_sources_gradient(self: Unpadding, x_BHTK: mx.array) -> mx.array:
    forward = mx.custom_function(lambda x_BHTK: self.take(x_BHTK))
    forward.vjp(lambda _, d_1UO, __: self.put(d_1UO, self.source_BT, x_BHTK.shape[1]))
    return forward(x_BHTK)


def bound_late() -> Callable[..., mx.array]:
    """The function to recompute reads the loop's variable when it is called, not when it is made."""
    loop: dict[str, Any] = {}

    def forward_block(decoder: Any, layer: Any, x_BTD: mx.array, layout: Any) -> mx.array:
        loop["layer"] = layer
        if decoder.grad_checkpoint and decoder.training:
            return recomputed(layer, lambda x_BTD: block(loop["layer"], x_BTD, layout), x_BTD)
        return block(layer, x_BTD, layout)

    return forward_block


# ---- adapters


def unquantized_linears(model: Any, num_layers: int) -> dict[str, Any]:
    linears = linears_of_last_blocks(model, num_layers)
    return {name: module for name, module in linears.items() if isinstance(module, nn.Linear)}


def alpha_without_a_rank(name: str, config: Any) -> tuple[int, float]:
    rank = of_pattern(name, config.rank_pattern, config.rank)
    has_rank = any(matches_end(name, pattern) for pattern in config.rank_pattern)
    alpha = config.alpha if has_rank else of_pattern(name, config.alpha_pattern, config.alpha)
    return rank, alpha / rank**0.5 if config.use_rslora else alpha / rank


def delta_by_the_base_length(self: Any) -> mx.array:
    base_OI = dense_weight_OI(self.linear)
    stretch_O1 = (self.magnitude / mx.linalg.norm(base_OI, axis=1))[:, None]
    return (stretch_O1 - 1) * base_OI + stretch_O1 * LoRALinear.delta_OI(self)


# ---- update


def always_scaled(grads: Any, max_norm: float) -> tuple[Any, mx.array]:
    _, norm = clip_gradients(grads, 0.0)
    factor = max_norm / (norm + 1e-6) if max_norm else mx.array(1.0)
    return tree_map(lambda grad: grad * factor.astype(grad.dtype), grads), norm


def clip_a_and_b(grads: dict[str, Any], max_norm: float) -> tuple[Any, mx.array]:
    clipped, norm = clip_gradients({k: grad for k, grad in grads.items() if k != "magnitude"}, max_norm)
    return {**grads, **clipped}, norm


def rate_from_the_start(step: int, config: Any) -> float:
    return learning_rate_of(step, config if step < config.warmup_steps else replace(config, warmup_steps=0))


def decay_by_the_rate_of_a(
    self: Any, config: Any, init: Callable[..., None] = LoRAOptimizer.__init__
) -> None:
    init(self, config)
    if config.optimizer == "adamw":
        self.optimizers[1].weight_decay /= config.loraplus_lr_ratio


# ---- state, generation


def digest_of_shapes(model: Any) -> str:
    arrays = sorted(tree_flatten(model.parameters()))
    described = "".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays)
    return hashlib.sha256(described.encode()).hexdigest()


@contextmanager
def left_in_evaluation(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield


def cut_within_the_nucleus(logits_BV: mx.array, top_p: float) -> mx.array:
    order_BV = mx.argsort(-logits_BV, axis=-1)
    sorted_BV = mx.take_along_axis(logits_BV, order_BV, axis=-1)
    sum_BV = mx.cumsum(mx.softmax(sorted_BV, axis=-1, precise=True), axis=-1)
    is_kept_BV = (sum_BV <= top_p) | (mx.arange(logits_BV.shape[-1]) == 0)
    return mx.put_along_axis(logits_BV, order_BV, mx.where(is_kept_BV, sorted_BV, -mx.inf), axis=-1)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "rest-of-nothing-is-the-whole-row",
        1,
        "The rest of a row is x[-rest:]: where a row is a multiple of 1024 long, it is summed twice.",
        {"mlx_impl.fast.cpu_ops.row_sums": row_sums_with_a_tail},
    ),
    Mutant(
        "attention-scaled-by-the-width",
        5,
        "Scores are divided by sqrt(hidden_size / heads), which is not sqrt(head_dim) in every model.",
        {"mlx_impl.fast.forward.attention": attention_of_the_width},
    ),
    Mutant(
        "grouped-in-the-size-of-the-last-batch",
        3,
        "Grouping takes its batch size from the epoch's last batch: a smaller one makes all batches small, "
        "and the epoch ends before all examples were trained.",
        {"mlx_impl.batching.group_by_length": grouped_in_the_size_of_the_last},
    ),
    Mutant(
        "ends-of-earlier-replies-masked",
        3,
        "With several replies, only the last one's end-of-turn token is a target.",
        {"mlx_impl.text.examples.turn_end": end_of_the_last_turn},
    ),
    Mutant(
        "prefix-past-a-rows-last-target",
        5,
        "A common prefix goes on where a row needs no more positions: rows of one text with other targets "
        "are computed from misplaced tokens.",
        {"mlx_impl.fast.kept_positions.shared_prefix_length": prefix_of_whole_rows},
    ),
    Mutant(
        "shared-gradient-in-every-row",
        6,
        "The gradient of what attention gives at a shared prefix is put into every row, and then summed over "
        "the rows.",
        {"mlx_impl.fast.unpadding.Unpadding.gather": gather_with_the_sources_gradient},
    ),
    Mutant(
        "end-of-a-name-within-a-number",
        2,
        'A target is compared by str.endswith: "1.self_attn.q_proj" is also that of layer 11.',
        {"mlx_impl.targets.ends_with": str.endswith},
    ),
    Mutant(
        "quantized-linears-without-an-adapter",
        15,
        "Only nn.Linear is looked for: where a part of the linears is quantized, these get no adapter.",
        {"mlx_impl.targets.linears_of_last_blocks": unquantized_linears},
    ),
    Mutant(
        "gradients-scaled-up-to-the-limit",
        8,
        "Clipping scales every gradient to the largest norm, smaller ones up to it.",
        {"mlx_impl.train.clip_gradients": always_scaled},
    ),
    Mutant(
        "schedule-counts-the-warmup",
        9,
        "The schedule after a warmup is that of a run without one: the rate falls when the warmup ends.",
        {"mlx_impl.train.learning_rate_of": rate_from_the_start},
    ),
    Mutant(
        "recomputed-block-bound-late",
        10,
        "A checkpointed block is looked up when it is recomputed, and is then the last one, so that the "
        "other blocks' factors have no gradient.",
        {"mlx_impl.fast.forward.forward_block": bound_late()},
    ),
    Mutant(
        "window-read-ahead-is-lost",
        12,
        "The next window is fetched during an update: a run that stops and goes on with the rest of its "
        "windows never trains on it.",
        {"mlx_impl.run.trainer.with_targets": read_ahead},
    ),
    Mutant(
        "state-of-another-base-accepted",
        12,
        "The digest of the frozen weights is of their names and shapes: a state resumes on other weights.",
        {"mlx_impl.run.trainer.digest_of_base": digest_of_shapes},
    ),
    Mutant(
        "alpha-pattern-lost-beside-a-rank-pattern",
        2,
        "A linear with a rank of its own is not asked for an alpha of its own.",
        {
            "mlx_impl.targets.rank_and_scale": alpha_without_a_rank,
            "mlx_impl.files.formats.adapter_conversion.rank_and_scale": alpha_without_a_rank,
        },
    ),
    Mutant(
        "b-decayed-by-the-rate-of-a",
        8,
        "With LoRA+ the weight decay of B goes by the learning rate of A.",
        {"mlx_impl.optim.LoRAOptimizer.__init__": decay_by_the_rate_of_a},
    ),
    Mutant(
        "magnitude-left-out-of-clipping",
        13,
        "With DoRA the gradient of the magnitude is neither clipped nor counted in the norm.",
        {"mlx_impl.train.clip_gradients": clip_a_and_b},
    ),
    Mutant(
        "dora-merged-by-the-base-length",
        15,
        "A DoRA linear is merged by m / |W|, where it computes with m / |W + dW|.",
        {"mlx_impl.lora.DoRALinear.delta_OI": delta_by_the_base_length},
    ),
    Mutant(
        "mlx-lm-scale-read-as-alpha",
        17,
        "The scale in mlx-lm's file is taken for alpha, and divided by the rank again.",
        {"mlx_impl.files.formats.adapter_conversion.alpha_for": lambda scale, rank: float(scale)},
    ),
    Mutant(
        "generation-turns-dropout-off",
        14,
        "After an answer the model stays in evaluation: a loop of one's own goes on without dropout.",
        {
            "mlx_impl.fast.answer.in_evaluation": left_in_evaluation,
            "mlx_impl.fast.decode.in_evaluation": left_in_evaluation,
        },
    ),
    Mutant(
        "nucleus-without-the-token-that-reaches-it",
        19,
        "The nucleus ends before the token with which its probability reaches top_p.",
        {"mlx_impl.run.sampling.cut_to_nucleus": cut_within_the_nucleus},
    ),
)
