"""Rung 15: settings that are dropped, or taken for others; memory that is not saved; float32 in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_impl import ops, targets
from mlx_impl.config import RopeScaling
from mlx_impl.data import Batch, Window
from mlx_impl.fast import projection
from mlx_impl.fast import recompute as fast_recompute
from mlx_impl.fast.low_rank import LowRank
from mlx_impl.fast.vectors import VectorOptimizer, as_vectors
from mlx_impl.lora import add_lora, dense_weight_OI
from mlx_impl.model import CausalLM, RMSNorm, rope_frequencies
from mlx_impl.optim import LoRAOptimizer
from mlx_impl.run import guard
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.train import train
from tests.trainers.mutants.mutant import Mutant, Patches, training

ROPE, GATED, UPDATE = ops.rope, projection.project_gated, VectorOptimizer.update
NORM: Any = RMSNorm.__call__
SNAPSHOT, MAKE = guard.snapshot, LoRATrainer.__init__
TIMES_SCALE, IS_TARGET, OF_PATTERN = projection.times_scale, targets.is_target, targets.of_pattern
MAKE_OPTIMIZER = LoRAOptimizer.__init__
recomputed, linears_of_last_blocks = fast_recompute.recomputed, targets.linears_of_last_blocks
Forward = Callable[[mx.array], mx.array]


def scaling(change: Callable[[RopeScaling], RopeScaling]) -> Patches:
    """RoPE with another scaling than the configuration's, where it has one of Llama 3's."""

    def broken(config: Any) -> tuple[float, ...]:
        given = config.rope_scaling
        is_changed = given is not None and given.rope_type == "llama3"
        return rope_frequencies(replace(config, rope_scaling=change(given)) if is_changed else config)

    return {"mlx_impl.model.rope_frequencies": broken}


def rates(of_b: Callable[[float], float]) -> Patches:
    """LoRA+ with another ratio."""

    def broken(self: Any, learning_rate: float) -> None:
        self.optimizers[0].learning_rate = learning_rate
        self.optimizers[1].learning_rate = of_b(self.ratio) * learning_rate

    return {"mlx_impl.optim.LoRAOptimizer.set_learning_rate": broken}


def decaying_a_alone(self: Any, config: Any) -> None:
    MAKE_OPTIMIZER(self, config)
    if config.weight_decay:
        self.optimizers[1].weight_decay = 0.0


def scaled_by_the_first(h_RN: mx.array, parts: list[LowRank]) -> mx.array:
    ranks = {part.a_IR.shape[1] for part in parts}
    return parts[0].scale * h_RN if len(ranks) == 1 else TIMES_SCALE(h_RN, parts)


def last_match(name: str, patterns: dict, default: Any) -> Any:
    return OF_PATTERN(name, dict(reversed(patterns.items())), default)


def matches_without_brackets(name: str, pattern: str) -> bool:
    return targets.compiled(rf"(.*\.)?{pattern}").fullmatch(name) is not None


def target_at_the_beginning(name: str, config: Any) -> bool:
    expression = config.target_modules
    if not isinstance(expression, str) or expression == "all-linear":
        return IS_TARGET(name, config)
    return targets.compiled(expression).match(name) is not None


def every_other_block() -> Callable:
    calls = count()

    def broken(block: nn.Module, of_block: Forward, x_BTD: mx.array) -> mx.array:
        return recomputed(block, of_block, x_BTD) if next(calls) % 2 else of_block(x_BTD)

    return broken


def with_a_copy_of_the_base(model: CausalLM, optimizer: Any) -> dict[str, mx.array]:
    copied = tree_map(lambda x: x + 0, model.parameters())
    mx.eval(copied)
    return SNAPSHOT(model, optimizer) | dict(tree_flatten({"base": copied}))


def with_moments_of_everything(self: Any, model: CausalLM, *more: Any, **named: Any) -> None:
    MAKE(self, model, *more, **named)
    self.unused = tree_map(mx.zeros_like, model.parameters())
    mx.eval(self.unused)


class Whole(list[Batch]):
    """The micro-batches of an update as if they were one."""

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self)

    @property
    def numbers(self) -> list[int]:
        return [number for batch in self for number in batch.numbers]


def whole_of(window: Window) -> Any:
    return Whole(window)


def in_one_graph(model: Any, optimizer: Any, windows: Any, config: Any, **more: Any) -> Iterator[Any]:
    """Eager, activations kept, and without dropout, whose masks are seeded for each micro-batch."""
    if more["compiled"] or config.grad_checkpoint or model.lora.dropout:
        yield from train(model, optimizer, windows, config, **more)
        return
    loss = more.pop("loss")

    def batch_loss(model: Any, of_each: list) -> Any:
        nats = []
        for arrays in of_each:
            nats.append(loss.batch_loss(model, arrays))
            mx.eval(nats)  # a part of the graph that is evaluated holds its memory until the end
        return tuple(sum(terms[1:], terms[0]) for terms in zip(*nats, strict=True))

    whole = loss._replace(to_arrays=lambda window: list(map(loss.to_arrays, window)), batch_loss=batch_loss)
    yield from train(model, optimizer, ([whole_of(window)] for window in windows), config, loss=whole, **more)


def rope_in_float32(x_BHTK: mx.array, frequency_P: tuple[float, ...], position: Any) -> mx.array:
    return ROPE(ops.widened(x_BHTK), frequency_P, position)


def norm_in_float32(self: Any, x_BTD: mx.array) -> mx.array:
    return NORM(self, ops.widened(x_BTD))


def dora_in_float32(self: Any, x_BTI: mx.array) -> mx.array:
    direction_BTO = x_BTI @ dense_weight_OI(self.linear).T + self.scale * self.update_BTO(x_BTI)
    y_BTO = self.magnitude / self.length_O() * direction_BTO
    return y_BTO + self.linear.bias if "bias" in self.linear else y_BTO


def fast_dora_in_float32(self: LowRank, y_NO: mx.array, lengths_O: Iterator[mx.array]) -> mx.array:
    if self.magnitude_O is not None:
        y_NO = self.magnitude_O / mx.stop_gradient(next(lengths_O)) * y_NO
    return y_NO if self.bias_O is None else y_NO + self.bias_O


def add_lora_and_widen(model: Any, config: Any) -> None:
    add_lora(model, config)
    model.update(tree_map(ops.widened, model.parameters()))


def gated_in_float32(gate_BTF: mx.array, up_BTF: mx.array, linear: nn.Module) -> mx.array:
    return GATED(ops.widened(gate_BTF), ops.widened(up_BTF), linear).astype(gate_BTF.dtype)


def is_in_bfloat16(model: Any) -> bool:
    return model.model.embed_tokens.weight.dtype == mx.bfloat16


def rounded(tree: Any) -> Any:
    return tree_map(lambda x: x.astype(mx.bfloat16).astype(x.dtype) if x.dtype == mx.float32 else x, tree)


def with_factors_in_bfloat16(self: Any, model: Any, gradients: Any) -> None:
    UPDATE(self, model, gradients)
    if is_in_bfloat16(model):
        self.factors.update(rounded(self.factors))
        self.write_back(model)


def with_moments_in_bfloat16(self: Any, model: Any, gradients: Any) -> None:
    UPDATE(self, model, gradients)
    if is_in_bfloat16(model):
        for optimizer in self.optimizers:
            optimizer.state = {
                n: rounded(x) if isinstance(x, dict) else x for n, x in optimizer.state.items()
            }


def gradients_as_they_come(gradients: Any) -> dict[str, mx.array]:
    wide = as_vectors(gradients)
    dtypes = {n.rpartition(".")[2]: x.dtype for n, x in tree_flatten(gradients)}
    return {kind: vector.astype(dtypes[kind]) for kind, vector in wide.items()}


MUTANTS = [
    Mutant(
        "llama3-factor-fixed",
        4,
        "Llama 3's RoPE scaling always divides by 8, whatever the configuration's factor is.",
        scaling(lambda given: replace(given, factor=8.0)),
        cases=("llama3 rope",),
    ),
    Mutant(
        "llama3-bands-fixed",
        4,
        "Llama 3's RoPE scaling ignores low_freq_factor and high_freq_factor, and takes 1 and 4.",
        scaling(lambda given: replace(given, low_freq_factor=1.0, high_freq_factor=4.0)),
        cases=("llama3 rope",),
    ),
    Mutant(
        "llama3-original-length-fixed",
        4,
        "Llama 3's RoPE scaling takes 8192 for the original length of every model.",
        scaling(lambda given: replace(given, original_max_position_embeddings=8192)),
        cases=("llama3 rope",),
    ),
    Mutant(
        "decay-of-a-alone",
        8,
        "Weight decay is set for A's group of parameters and forgotten for B's.",
        {"mlx_impl.optim.LoRAOptimizer.__init__": decaying_a_alone},
    ),
    Mutant(
        "alpha-of-the-first-linear",
        13,
        "Linears of one rank are computed together, and all are scaled by the first one's alpha.",
        {"mlx_impl.fast.projection.times_scale": scaled_by_the_first},
    ),
    Mutant(
        "num-layers-as-a-switch",
        2,
        "num_layers is read as a switch: any number but -1 adapts the last layer alone.",
        {
            "mlx_impl.targets.linears_of_last_blocks": lambda model, number: linears_of_last_blocks(
                model, -1 if number == -1 else 1
            )
        },
    ),
    Mutant(
        "last-pattern-decides",
        15,
        "Of several patterns that match a linear the last one decides its rank and alpha, not the first.",
        {"mlx_impl.targets.of_pattern": last_match},
    ),
    Mutant(
        "pattern-without-brackets",
        15,
        "A pattern is put into a longer expression without brackets, so `a|b` matches other linears.",
        {"mlx_impl.targets.matches_end": matches_without_brackets},
    ),
    Mutant(
        "expression-matches-a-beginning",
        15,
        "The regular expression of target_modules need only match the beginning of a name.",
        {"mlx_impl.targets.is_target": target_at_the_beginning},
    ),
    Mutant(
        "loraplus-ratio-as-a-whole-number",
        15,
        "LoRA+'s ratio is parsed as a whole number, so 2.5 acts as 2.",
        rates(lambda ratio: float(int(ratio)) if ratio > 1 else ratio),
    ),
    Mutant(
        "loraplus-never-slower",
        15,
        "A ratio of LoRA+ below 1 is accepted, and B learns as fast as A.",
        rates(lambda ratio: max(1.0, ratio)),
    ),
    Mutant(
        "checkpointing-does-nothing",
        15,
        "grad_checkpoint is accepted, and every block keeps its activations.",
        {"mlx_impl.fast.forward.recomputed": lambda block, of_block, x_BTD: of_block(x_BTD)},
    ),
    Mutant(
        "every-other-block-checkpointed",
        15,
        "With grad_checkpoint every other block still keeps its activations.",
        {"mlx_impl.fast.forward.recomputed": every_other_block()},
    ),
    Mutant(
        "micro-batches-at-once",
        15,
        "In an eager run the losses of all micro-batches are differentiated together, so all are in memory.",
        training(in_one_graph),
    ),
    Mutant(
        "base-copied-for-the-rollback",
        15,
        "What is kept for a rollback has a copy of the frozen weights too.",
        {"mlx_impl.run.guard.snapshot": with_a_copy_of_the_base},
    ),
    Mutant(
        "unused-moments-of-the-base",
        15,
        "Memory for moments of the frozen weights is held, although the optimizer does not use it.",
        {"mlx_impl.run.trainer.LoRATrainer.__init__": with_moments_of_everything},
    ),
    Mutant(
        "rope-widens",
        15,
        "RoPE returns float32 for bfloat16, so attention and all that follows it is float32.",
        {"mlx_impl.ops.rope": rope_in_float32},
    ),
    Mutant(
        "norm-widens",
        15,
        "RMSNorm computes in float32 and does not cast back, so a bfloat16 model is float32 from there on.",
        {"mlx_impl.model.RMSNorm.__call__": norm_in_float32},
    ),
    Mutant(
        "magnitude-widens",
        15,
        "DoRA's magnitude is float32, and so is all that follows an adapted linear of a bfloat16 model.",
        {
            "mlx_impl.lora.DoRALinear.__call__": dora_in_float32,
            "mlx_impl.fast.low_rank.LowRank.finish": fast_dora_in_float32,
        },
    ),
    Mutant(
        "adapter-widens-the-base",
        15,
        "Adding the adapter converts the frozen bfloat16 weights to the factors' float32.",
        {"tests.trainers.mlx_impl.add_lora": add_lora_and_widen},
    ),
    Mutant(
        "gate-in-float32",
        15,
        "The feed-forward's gate is computed in float32 and cast back: every state looks like bfloat16.",
        {"mlx_impl.fast.forward.project_gated": gated_in_float32},
    ),
    Mutant(
        "factors-in-the-bases-type",
        15,
        "After an update the factors are cast to the base's bfloat16, which loses most small updates.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": with_factors_in_bfloat16},
    ),
    Mutant(
        "moments-in-the-bases-type",
        15,
        "Over a bfloat16 base the optimizer's moments are bfloat16 too.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": with_moments_in_bfloat16},
    ),
    Mutant(
        "micro-batches-summed-in-bfloat16",
        15,
        "Over a bfloat16 base the gradients of the micro-batches are added up in bfloat16.",
        {"mlx_impl.fast.forward.as_vectors": gradients_as_they_come},
    ),
    Mutant(
        "loss-in-bfloat16",
        15,
        "The cross-entropy of bfloat16 logits is not computed in float32.",
        {"mlx_impl.fast.ops.widened": lambda x: x},
    ),
]
