"""Planted bugs that were written down before any claim was run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.optimizers import MultiOptimizer
from mlx.utils import tree_map_with_path

from mlx_impl import ops
from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Batch, Example
from mlx_impl.fast.forward import block
from mlx_impl.fast.kept_positions import shared_prefix_length
from mlx_impl.fast.low_rank import LowRank, low_rank_of
from mlx_impl.fast.projection import JointLinears, project, times_scale
from mlx_impl.fast.recompute import recomputed
from mlx_impl.fast.vectors import VectorOptimizer, all_finite, as_tree, from_tree
from mlx_impl.files.formats.peft import to_record
from mlx_impl.generate import most_likely
from mlx_impl.lora import DoRALinear, LoRALinear
from mlx_impl.model import CausalLM
from mlx_impl.ops import widened
from mlx_impl.optim import LoRAOptimizer
from mlx_impl.run.sampling import cut_to_nucleus
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.targets import select_targets
from mlx_impl.text.examples import encode_file
from mlx_impl.train import Sums, add_up, evaluate
from tests.trainers.mutants.mutant import PLAIN, Mutant, with_add_up

init_of_optimizer, init_of_vectors = LoRAOptimizer.__init__, VectorOptimizer.init
init_of_dora, delta_of_lora = DoRALinear.__init__, LoRALinear.delta_OI
gradients_of_group = JointLinears.backward
evaluate_examples, evaluate_batches = LoRATrainer.evaluate, LoRATrainer.evaluate_batches


def cut_with_an_end(tokenizer: Any, conversations: Any, targets: str, max_tokens: int, *given: Any) -> Any:
    encoded = encode_file(tokenizer, conversations, targets, max_tokens, *given)
    ended = [
        Example((*e.tokens[:-1], tokenizer.eos_id), (*e.is_target[:-1], True))
        if len(e.tokens) == max_tokens
        else e
        for e in encoded.examples
    ]
    return replace(encoded, examples=ended)


def prefix_of_the_next_tokens(batch: Batch, is_needed_BT: Any) -> int:
    return shared_prefix_length(batch._replace(inputs_BT=batch.targets_BT), is_needed_BT)


def adapted_ones_first(x_BTI: mx.array, *linears: nn.Module) -> list[mx.array]:
    ys = project(x_BTI, *linears)
    return [ys[j] for j in sorted(range(len(ys)), key=lambda j: low_rank_of(linears[j]) is None)]


def has_adapter(layer: nn.Module) -> bool:
    return any(isinstance(module, LoRALinear) for module in layer.modules())


def constant_without_adapter(layer: Any, x_BTD: mx.array, layout: Any) -> mx.array:
    y_BTD = block(layer, x_BTD, layout)
    return y_BTD if has_adapter(layer) else mx.stop_gradient(y_BTD)


def recomputed_with_adapter(layer: nn.Module, forward: Callable, x_BTD: mx.array) -> mx.array:
    return recomputed(layer, forward, x_BTD) if has_adapter(layer) else forward(x_BTD)


def grouped_by_the_beginning(self: LoRAOptimizer, config: TrainConfig) -> None:
    init_of_optimizer(self, config)
    MultiOptimizer.__init__(self, self.optimizers, [lambda name, _: name.startswith("lora_a")])


def mean_of_means(_: TrainConfig) -> Callable[[Iterable[Callable[[], Sums]]], Sums]:
    def reduce(parts: Iterable[Callable[[], Sums]]) -> Sums:
        means: list[mx.array] = []

        def noted(part: Callable[[], Sums]) -> Sums:
            (nats, count), grads = part()
            means.append(nats / mx.maximum(count, 1))
            return (nats, count), grads

        (nats, count), grads = add_up(partial(noted, part) for part in parts)
        return (sum(means) / len(means) * count if len(means) > 1 else nats, count), grads

    return reduce


def updated_in_place(self: VectorOptimizer, model: nn.Module, gradients: Any) -> None:
    for kind, vector in self.apply_gradients(gradients, dict(self.factors)).items():
        self.factors[kind][:] = vector
    self.flags["finite"] = all_finite(self.factors)
    self.write_back(model)


def remembered_for_the_step(self: LoRATrainer, examples: Any) -> float:
    losses = self.__dict__.setdefault("losses_by_step", {})
    if self.step not in losses:
        losses[self.step] = evaluate_examples(self, examples)
    return losses[self.step]


def saved_unturned(state: dict, factors: Any) -> Any:
    tree = as_tree(state, factors)
    return tree_map_with_path(lambda name, x: x.T.reshape(x.shape) if ".lora_a." in name else x, tree)


def loaded_unturned(tree: dict, factors: Any) -> Any:
    turned = tree_map_with_path(lambda name, x: x.reshape(x.shape[::-1]).T if ".lora_a." in name else x, tree)
    return from_tree(turned, factors)


def joined_once(self: VectorOptimizer, parameters: Any) -> None:
    if not hasattr(self, "factors"):
        init_of_vectors(self, parameters)


def rope_of_the_base_alone(
    x_BHTK: mx.array, frequency_P: tuple[float, ...], position: Any, real: Any = ops.rope
) -> mx.array:
    if not isinstance(position, int) and len(frequency_P) > 1:
        ratio = frequency_P[1] / frequency_P[0]
        frequency_P = tuple(ratio**k for k in range(len(frequency_P)))
    return real(x_BHTK, frequency_P, position)


def length_without_offsets(self: DoRALinear, linear: Any, *settings: Any) -> None:
    init_of_dora(self, linear, *settings)
    if isinstance(linear, nn.QuantizedLinear):
        offsets, how = mx.zeros_like(linear.biases), (linear.group_size, linear.bits)
        self.magnitude = mx.linalg.norm(mx.dequantize(linear.weight, linear.scales, offsets, *how), axis=1)


def evaluated_by_a_compiled_function(self: LoRATrainer, batches: Iterable[Batch]) -> float:
    if not self.compiled or self.ranks:
        return evaluate_batches(self, batches)
    whole = mx.compile(partial(self.loss.batch_loss, self.model))
    once = self.__dict__.setdefault("compiled_loss", whole)
    return evaluate(self.model, batches, self.loss._replace(batch_loss=lambda _, arrays: once(arrays)))[0]


def mode_where_it_changes(self: CausalLM, mode: bool = True) -> CausalLM:
    return self if self.training == mode else nn.Module.train(self, mode)


def targets_in_a_set(model: CausalLM, config: LoRAConfig) -> list:
    return list(set(select_targets(model, config)))


def scaled_by_float32(h_RN: mx.array, parts: list[LowRank]) -> mx.array:
    scaled_RN = times_scale(h_RN, parts)
    return widened(scaled_RN) if len({part.scale for part in parts}) > 1 else scaled_RN


def gradients_in_the_inputs_type(self: JointLinears, x_NI: mx.array, *others: Any) -> list[mx.array]:
    return [gradient.astype(x_NI.dtype) for gradient in gradients_of_group(self, x_NI, *others)]


def delta_kept(self: LoRALinear) -> mx.array:
    if type(self) is not LoRALinear:
        return delta_of_lora(self)
    if "_delta_OI" not in self:
        self["_delta_OI"] = delta_of_lora(self)
    return self["_delta_OI"]


def record_with_short_patterns(config: LoRAConfig, *others: Any) -> dict[str, Any]:
    last = {key: key.rpartition(".")[2] for key in config.alpha_pattern}
    short = {name if name.isidentifier() else key: config.alpha_pattern[key] for key, name in last.items()}
    return to_record(config, *others) | {"alpha_pattern": short}


def sampled_in_the_models_type(self: Any, logits_BV: mx.array) -> mx.array:
    if self.temperature == 0:
        return most_likely(logits_BV)
    logits_BV = logits_BV / self.temperature
    return mx.random.categorical(cut_to_nucleus(logits_BV, self.top_p) if self.top_p < 1 else logits_BV)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "end-token-after-a-cut",
        3,
        "An example that was cut gets an end token in its last place: the model learns to stop mid-sentence.",
        {
            "mlx_impl.text.examples.encode_file": cut_with_an_end,
            "mlx_impl.cli.training.job_data.encode_file": cut_with_an_end,
        },
    ),
    Mutant(
        "outputs-in-the-order-of-computing",
        2,
        "Adapted linears are computed first, and the results are returned in that order: where queries and "
        "values have an adapter and keys have none, keys and values change places.",
        {"mlx_impl.fast.forward.project": adapted_ones_first},
    ),
    Mutant(
        "prefix-told-by-the-next-tokens",
        5,
        "A common prefix is looked for in the targets, not in the inputs: rows that differ in their first "
        "token alone all get that of the first row.",
        {"mlx_impl.fast.kept_positions.shared_prefix_length": prefix_of_the_next_tokens},
    ),
    Mutant(
        "block-without-adapter-is-a-constant",
        6,
        "A block without an adapter runs as under no_grad, so adapters in the blocks below learn nothing.",
        {"mlx_impl.fast.forward.block": constant_without_adapter},
        cases=("regex",),
    ),
    Mutant(
        "group-by-the-beginning-of-a-name",
        8,
        "A's group is that of names that begin with lora_a, and in a tree none does: A gets the rate of B.",
        {"mlx_impl.optim.LoRAOptimizer.__init__": grouped_by_the_beginning},
        trainer=PLAIN,
    ),
    Mutant(
        "reported-loss-is-a-mean-of-means",
        10,
        "The gradients of micro-batches are weighted by their targets, but the reported loss is not.",
        with_add_up(mean_of_means),
    ),
    Mutant(
        "factors-overwritten-beneath-the-rollback",
        12,
        "An update writes into the arrays that the guard keeps for its rollback: after NaN the adapter "
        "stays ruined.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": updated_in_place},
    ),
    Mutant(
        "evaluation-remembered-for-the-step",
        12,
        "The loss of an evaluation is remembered until the next update, whatever the examples are: a second "
        "validation set gets the loss of the first.",
        {"mlx_impl.run.trainer.LoRATrainer.evaluate": remembered_for_the_step},
    ),
    Mutant(
        "factors-loaded-between-two-fits-are-lost",
        12,
        "The optimizer's vectors are joined once: who puts an earlier adapter back into the model and "
        "trains on continues from the later one.",
        {"mlx_impl.fast.vectors.VectorOptimizer.init": joined_once},
    ),
    Mutant(
        "packed-rows-without-rope-scaling",
        5,
        "Packed rows have position ids, and the code for these takes RoPE's base and forgets its scaling.",
        {"mlx_impl.ops.rope": rope_of_the_base_alone},
        cases=("llama3 rope",),
        trainer=PLAIN,
    ),
    Mutant(
        "dora-length-without-the-offsets",
        15,
        "DoRA begins with the lengths of scale * q, and forgets that a quantized base adds an offset.",
        {"mlx_impl.lora.DoRALinear.__init__": length_without_offsets},
    ),
    Mutant(
        "compiled-evaluation-keeps-the-factors",
        12,
        "In a compiled run the validation is compiled too, without the model as an input: its loss stays "
        "that of the first adapter.",
        {"mlx_impl.run.trainer.LoRATrainer.evaluate_batches": evaluated_by_a_compiled_function},
    ),
    Mutant(
        "mode-set-where-it-changes",
        17,
        "A model that is in evaluation already is left as it is, so an adapter that was added since still "
        "drops inputs.",
        {"mlx_impl.model.CausalLM.train": mode_where_it_changes},
    ),
    Mutant(
        "initial-factors-by-hash-order",
        14,
        "Targets are collected in a set, so which linear draws its A first changes from process to process.",
        {"mlx_impl.lora.select_targets": targets_in_a_set},
    ),
    Mutant(
        "scales-of-their-own-widen",
        15,
        "Where linears of one input have unlike scales, these are a float32 array: a bfloat16 model is "
        "float32 from there on.",
        {
            "mlx_impl.fast.projection.times_scale": scaled_by_float32,
            "mlx_impl.fast.projection.JointLinears.backward": gradients_in_the_inputs_type,
        },
    ),
    Mutant(
        "only-adapted-blocks-checkpointed",
        15,
        "With grad_checkpoint a block without an adapter keeps its activations, as if it had no gradient.",
        {"mlx_impl.fast.forward.recomputed": recomputed_with_adapter},
    ),
    Mutant(
        "delta-of-the-first-merge",
        16,
        "A layer remembers its update when it is merged: unmerged, trained on and merged again, the model "
        "gets the old one.",
        {"mlx_impl.lora.LoRALinear.delta_OI": delta_kept},
    ),
    Mutant(
        "alpha-pattern-cut-to-a-name",
        17,
        "The record keeps the last part of a pattern alone, so an alpha of one layer is that of all layers.",
        {"mlx_impl.files.formats.peft.to_record": record_with_short_patterns},
    ),
    Mutant(
        "nucleus-summed-in-the-models-type",
        19,
        "A bfloat16 model's nucleus is summed in bfloat16, where small probabilities add nothing: it never "
        "reaches top_p and holds nearly all tokens.",
        {"mlx_impl.run.sampling.Sampling.__call__": sampled_in_the_models_type},
    ),
)

# No rung can meet this one, because it takes two trainers; `tests/units/test_fast_trains_as_plain.py` does.
OF_TWO_TRAINERS: tuple[Mutant, ...] = (
    Mutant(
        "moments-of-a-saved-unturned",
        12,
        "The fast path keeps A's moments transposed, and saves and loads their numbers in that order under "
        "A's shape: the plain path resumes with moments of other elements.",
        {
            "mlx_impl.fast.vectors.as_tree": saved_unturned,
            "mlx_impl.fast.vectors.from_tree": loaded_unturned,
        },
    ),
)
