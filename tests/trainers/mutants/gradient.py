"""Rungs 6 and 7: the loss is right but its gradient is wrong; or the wrong parameters train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_impl.fast.head import head_nats
from mlx_impl.fast.low_rank import LowRank
from mlx_impl.fast.packed import unpacked
from mlx_impl.fast.projection import products, project
from mlx_impl.fast.row_lengths import row_lengths
from mlx_impl.fast.vectors import VectorOptimizer, as_factors
from mlx_impl.model import CausalLM
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.train import train
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches, lora_call, training

init, head, update = LoRATrainer.__init__, CausalLM.head, VectorOptimizer.update
stop, finish = mx.stop_gradient, LowRank.finish


def lora(update_of: Callable[[Any, mx.array], mx.array]) -> Patches:
    """A LoRA layer whose forward value is right and whose gradient is wrong."""
    return lora_call(lambda self, x: self.linear(x) + self.scale * update_of(self, x))


def first_row_only(decoder: Any, tokens_BT: mx.array, positions_N: mx.array, *_: Any) -> mx.array:
    x_BTD = decoder(tokens_BT)
    return mx.concatenate([x_BTD[:1], stop(x_BTD[1:])]).flatten(0, 1)[positions_N]


def cut_base(self: Any, x_BTI: mx.array) -> mx.array:
    return self.linear(stop(x_BTI)) + self.scale * ((self.dropout(x_BTI) @ self.lora_a) @ self.lora_b)


@mx.custom_function
def rounding_backwards(x: mx.array) -> mx.array:
    return x + 0


@rounding_backwards.vjp
def _(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
    return cotangent.astype(mx.bfloat16).astype(x.dtype)


def nats_of_gradient(factor: float) -> Patches:
    """The right loss, with its gradient multiplied by a number."""

    def broken(*arguments: Any) -> tuple[mx.array, mx.array]:
        nats, num_targets = head_nats(*arguments)
        return stop(nats) + factor * (nats - stop(nats)), num_targets

    return {"mlx_impl.fast.forward.head_nats": broken}


def with_fillings_backwards(
    head: Any, vocab_size: int, x: mx.array, targets: mx.array, mask: mx.array
) -> Any:
    nats, num_targets = head_nats(head, vocab_size, x, targets, mask)
    of_all, _ = head_nats(head, vocab_size, x, targets, mx.ones_like(mask))
    return stop(nats) + of_all - stop(of_all), num_targets


def of_parts(change: Callable[[int, LowRank], LowRank]) -> Patches:
    """Linears that share an input; `change` gets the index of each."""
    return {
        "mlx_impl.fast.projection.products": lambda x, parts: products(
            x, [change(place, part) for place, part in enumerate(parts)]
        )
    }


def unscaled_a(_: int, part: LowRank) -> LowRank:
    fixed_IR = stop(part.a_IR)
    return part._replace(a_IR=fixed_IR + (part.a_IR - fixed_IR) / part.scale)


def trained_if_first(place: int, part: LowRank) -> LowRank:
    if place == 0:
        return part
    magnitude_O = None if part.magnitude_O is None else stop(part.magnitude_O)
    return part._replace(a_IR=stop(part.a_IR), b_RO=stop(part.b_RO), magnitude_O=magnitude_O)


def passing_back_the_first(x_BTI: mx.array, *linears: Any) -> list[mx.array]:
    return [*project(x_BTI, linears[0]), *project(stop(x_BTI), *linears[1:])]


def with_trained_length(self: LowRank, y_NO: mx.array, lengths_O: Iterator[mx.array]) -> mx.array:
    if self.magnitude_O is None:
        return finish(self, y_NO, lengths_O)
    next(lengths_O)
    length_O = row_lengths(unpacked(self.weight_OI, y_NO), self.a_IR, self.b_RO, self.scale)
    y_NO = self.magnitude_O / length_O * y_NO
    return y_NO if self.bias_O is None else y_NO + self.bias_O


def begun(change: Callable[[Any], object]) -> Patches:
    """Changes the model when training begins."""

    def broken(model: Any, *more: Any, **named: Any) -> Iterator[Any]:
        change(model)
        yield from train(model, *more, **named)

    return training(broken)


def init_over_everything(self: Any, *arguments: Any) -> None:
    init(self, *arguments)
    self.optimizer.init(self.model.parameters())


def update_and_decay_the_rest(self: Any, model: Any, gradients: Any) -> None:
    update(self, model, gradients)
    trained = dict(tree_flatten(model.trainable_parameters()))
    rest = [(n, p) for n, p in tree_flatten(model.parameters()) if n not in trained]
    model.update(tree_unflatten([(n, p * (1 - self.optimizers[0].learning_rate * 0.1)) for n, p in rest]))


def update_without_a(self: Any, model: Any, gradients: Any) -> None:
    before = self.factors["lora_a"]
    update(self, model, gradients)
    self.factors["lora_a"] = before
    model.update(as_factors(self.factors, model.trainable_parameters()))


MUTANTS = [
    Mutant(
        "gradient-of-the-first-row",
        5,
        "The backward pass of a gather strides wrongly: gradients come from the batch's first row only.",
        {"mlx_impl.fast.forward.hidden_at_targets": first_row_only},
        "mlx#3483",
    ),
    Mutant(
        "a-gets-no-gradient",
        6,
        "The graph is cut between A and B, so A gets no gradient and B learns on a random projection.",
        lora(lambda self, x: stop(self.dropout(x) @ self.lora_a) @ self.lora_b),
        trainer=PLAIN,
    ),
    Mutant(
        "adapter-input-detached",
        6,
        "The adapter reads a detached input, so the layers below do not get its part of the gradient.",
        lora(lambda self, x: (self.dropout(stop(x)) @ self.lora_a) @ self.lora_b),
        trainer=PLAIN,
    ),
    Mutant(
        "base-without-gradient",
        6,
        "The frozen layer runs outside the graph, as under no_grad, so no gradient passes through it.",
        lora_call(cut_base),
        trainer=PLAIN,
    ),
    Mutant(
        "forward-outside-the-graph",
        6,
        "The forward pass runs outside the function that is differentiated: every gradient is exactly zero.",
        nats_of_gradient(0.0),
        "mlx-lm-lora#65",
    ),
    Mutant(
        "gradient-scaled-again",
        6,
        "The loss is right, but its gradient is doubled, because a factor is applied twice to it.",
        nats_of_gradient(2.0),
        "transformers#35207",
    ),
    Mutant(
        "gradient-of-logits-in-bfloat16",
        6,
        "The gradient of the logits is rounded to bfloat16, which leaves nothing of it for confident tokens.",
        {"mlx_impl.model.CausalLM.head": lambda self, x: rounding_backwards(head(self, x))},
        "Liger-Kernel#1329",
    ),
    Mutant(
        "fillings-backwards",
        6,
        "The loss leaves out positions that only pad the batch to its shape, but the gradient counts them.",
        {"mlx_impl.fast.forward.head_nats": with_fillings_backwards},
    ),
    Mutant(
        "scale-forgotten-backwards",
        6,
        "The hand-written gradient of A lacks the factor alpha / rank.",
        of_parts(unscaled_a),
    ),
    Mutant(
        "only-the-first-trains",
        6,
        "Several linears are computed together, and only the first one's factors get gradients.",
        of_parts(trained_if_first),
    ),
    Mutant(
        "only-the-first-passes-back",
        6,
        "Several linears are computed together, and only the first passes a gradient to their common input.",
        {"mlx_impl.fast.forward.project": passing_back_the_first},
    ),
    Mutant(
        "dora-length-trained",
        6,
        "DoRA's length gets a gradient; the paper (section 4.3) treats it as a constant.",
        {"mlx_impl.fast.low_rank.LowRank.finish": with_trained_length},
        cases=("dora",),
    ),
    Mutant(
        "shared-prompt-learned-from-one-row",
        6,
        "A prompt that all rows share is computed once, but gets only the gradient from one row.",
        {"mlx_impl.fast.unpadding.Unpadding.sum_over_rows": lambda self, d_BHTK: self.take(d_BHTK)},
    ),
    Mutant(
        "base-trained",
        7,
        "A run begins with unfreeze(), so the whole model trains, but only the adapter is saved.",
        begun(lambda model: model.unfreeze()),
    ),
    Mutant(
        "embedding-trained",
        7,
        "The embedding is left trainable.",
        begun(lambda model: model.model.embed_tokens.unfreeze()),
    ),
    Mutant(
        "norm-trained",
        7,
        "The last norm is left trainable; it is too small to show in a count of parameters.",
        begun(lambda model: model.model.norm.unfreeze()),
    ),
    Mutant(
        "bias-trained",
        7,
        "The biases of the adapted linears train, although the configuration does not ask for it.",
        begun(lambda model: model.unfreeze(keys="bias", strict=False)),
        cases=("qkv bias",),
    ),
    Mutant(
        "frozen-decayed",
        7,
        "The optimizer holds all parameters, so weight decay changes those without a gradient.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": update_and_decay_the_rest},
        "S-Prompts#2",
    ),
    Mutant(
        "moments-of-everything",
        7,
        "The optimizer is initialized with all parameters, so it holds two moments for each frozen one.",
        {"mlx_impl.run.trainer.LoRATrainer.__init__": init_over_everything},
    ),
    Mutant(
        "a-in-no-group",
        7,
        "Parameters are sorted into groups by learning rate, and A is in none of the groups.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": update_without_a},
    ),
    Mutant(
        "update-lost",
        7,
        "Gradients and moments are right, but the update is written to a copy, so no weight changes.",
        {"mlx_impl.fast.vectors.VectorOptimizer.update": lambda self, model, gradients: None},
    ),
]
