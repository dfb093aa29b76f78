"""Rung 13: a way to train that is right, and a feature that is right, and wrong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_impl.fast.projection import times_scale
from mlx_impl.lora import LoRALinear, lora_layers
from mlx_impl.model import rope_frequencies
from mlx_impl.optim import clip_gradients
from mlx_impl.recompute import recomputed
from mlx_impl.train import add_up, train
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches, training

Run = SimpleNamespace  # the arguments of `train`
init_linear = LoRALinear.__init__


def spoiled(when: Callable[[Run], bool], change: Callable[[Run], None]) -> Patches:
    """Runs of one kind, with another model, optimizer, configuration or sum than they were given."""

    def broken(model: Any, optimizer: Any, windows: Any, config: Any, **more: Any) -> Iterator[Any]:
        run = Run(model=model, optimizer=optimizer, config=config, **more)
        if when(run):
            change(run)
        rest = {
            name: value for name, value in vars(run).items() if name not in ("model", "optimizer", "config")
        }
        yield from train(run.model, run.optimizer, windows, run.config, **rest)

    return training(broken)


def compiled(run: Run) -> bool:
    return run.compiled


def resumed(run: Run) -> bool:
    return run.first_step > 0


def checkpointed(run: Run) -> bool:
    return run.config.grad_checkpoint


def always(run: Run) -> bool:
    return True


def configured(**changed: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.config = replace(run.config, **changed)

    return change


def with_the_first_rate(run: Run) -> None:
    set_learning_rate, rates = run.optimizer.set_learning_rate, []  # type: Any, list[float]

    def broken(learning_rate: float) -> None:
        rates.append(learning_rate)
        set_learning_rate(rates[0])

    run.optimizer.set_learning_rate = broken


def with_the_first_number_of_targets(run: Run) -> None:
    counts: list[mx.array] = []

    def broken(parts: Any) -> Any:
        (nats, num_targets), grads = add_up(parts)
        counts.append(num_targets)
        return (nats, num_targets), tree_map(lambda g: g * (num_targets / counts[0]), grads)

    run.reduce = broken


def without_loraplus(run: Run) -> None:
    run.optimizer.ratio = 1.0


def without_moments(run: Run) -> None:
    for optimizer in run.optimizer.optimizers:
        optimizer.state = {
            name: tree_map(mx.zeros_like, value) if isinstance(value, dict) else value
            for name, value in optimizer.state.items()
        }


def each_attention(change: Callable[[Any, Any], None]) -> Callable[[Run], None]:
    def of_run(run: Run) -> None:
        for block in run.model.model.layers:
            change(block.self_attn, run.model.config)

    return of_run


def without_rope_scaling(attention: Any, config: Any) -> None:
    attention.frequency_P = rope_frequencies(replace(config, rope_scaling=None))


def without_qk_norm(attention: Any, config: Any) -> None:
    attention.qk_norm = False


def without_window(run: Run) -> None:
    run.model.model.window = None


def each_linear(change: Callable[[Any, Any], None]) -> Callable[[Run], None]:
    def of_run(run: Run) -> None:
        for linear in lora_layers(run.model).values():
            change(linear, run.model.lora)

    return of_run


def off_where_biased(linear: Any, lora: Any) -> None:
    linear.scale = 0.0 if "bias" in linear.linear else linear.scale


def without_rslora(linear: Any, lora: Any) -> None:
    if lora.use_rslora:
        linear.scale = linear.scale / linear.lora_a.shape[1] ** 0.5


def kept(chosen: Callable[[list[Any]], list[Any]]) -> Callable[[Run], None]:
    """Only some of an update's micro-batches are added up."""

    def of_run(run: Run) -> None:
        run.reduce = lambda parts: add_up(chosen(list(parts)))

    return of_run


def clipped_one_by_one(run: Run) -> None:
    limit = run.config.max_grad_norm

    def clipped(part: Callable[[], Any]) -> Any:
        sums, grads = part()
        return sums, clip_gradients(grads, limit * sums[1])[0]

    def broken(parts: Any) -> Any:
        listed = list(parts)
        if len(listed) < 3 or not limit:
            return add_up(listed)
        return add_up([lambda part=part: clipped(part) for part in listed])  # type: ignore[misc]

    run.reduce = broken


def with_the_last_magnitude(run: Run) -> None:
    def broken(parts: Any) -> Any:
        done = [part() for part in parts]
        sums, grads = add_up([lambda one=one: one for one in done])  # type: ignore[misc]
        of_last = {kind: grad for kind, grad in done[-1][1].items() if kind == "magnitude"}
        return sums, {**grads, **of_last}

    run.reduce = broken


def counted_in_micro_batches(run: Run) -> None:
    run.first_step *= run.config.grad_accumulation_steps


def by_the_first_of_a_rank(h_RN: mx.array, parts: Any) -> mx.array:
    if len({part.a_IR.shape[1] for part in parts}) == 1:
        return parts[0].scale * h_RN
    return times_scale(h_RN, parts)


def dropping_at_the_default_rank(self: Any, linear: Any, rank: int, scale: float, dropout: float) -> None:
    init_linear(self, linear, rank, scale, dropout if rank in (3, 16) else 0.0)


def recomputed_by_position(block: Any, x_BTD: mx.array, position: Any, mask: Any, *others: Any) -> mx.array:
    return recomputed(block, x_BTD, position, None, *others)


MUTANTS = [
    Mutant(
        "compiled-keeps-the-first-rate",
        13,
        "A compiled step keeps the learning rate of its first update, so warmup and decay do nothing.",
        spoiled(compiled, with_the_first_rate),
    ),
    Mutant(
        "compiled-keeps-the-first-target-count",
        13,
        "A compiled step divides every gradient by the first update's number of targets.",
        spoiled(compiled, with_the_first_number_of_targets),
    ),
    Mutant(
        "compiled-without-loraplus",
        13,
        "A compiled step updates B at the learning rate of A, so LoRA+ does nothing.",
        spoiled(compiled, without_loraplus),
    ),
    Mutant(
        "compiled-without-rope-scaling",
        13,
        "A compiled step has the rotation frequencies without the model's rope scaling.",
        spoiled(compiled, each_attention(without_rope_scaling)),
    ),
    Mutant(
        "compiled-without-moments-after-a-stop",
        13,
        "A resumed run that is compiled begins with moments of zero.",
        spoiled(lambda run: compiled(run) and resumed(run), without_moments),
    ),
    Mutant(
        "checkpointed-without-schedule",
        12,
        "With checkpointing, the learning rate is constant.",
        spoiled(checkpointed, configured(lr_schedule="constant", warmup_steps=0)),
    ),
    Mutant(
        "checkpointed-without-clipping",
        13,
        "With checkpointing, gradients are not clipped.",
        spoiled(checkpointed, configured(max_grad_norm=0.0)),
    ),
    Mutant(
        "checkpointed-without-window",
        13,
        "With checkpointing, the sliding window is not passed on, so attention is full.",
        spoiled(checkpointed, without_window),
    ),
    Mutant(
        "recomputed-without-mask",
        12,
        "The recomputed block is not given the attention mask, so the sliding window is lost.",
        {"mlx_impl.model.recomputed": recomputed_by_position},
        trainer=PLAIN,
    ),
    Mutant(
        "checkpointed-without-qk-norm",
        13,
        "With checkpointing, queries and keys are not normed.",
        spoiled(checkpointed, each_attention(without_qk_norm)),
    ),
    Mutant(
        "checkpointed-without-biased-linears",
        13,
        "With checkpointing, the adapter of a linear that has a bias is left out.",
        spoiled(checkpointed, each_linear(off_where_biased)),
    ),
    Mutant(
        "middle-micro-batch-lost",
        10,
        "Of three micro-batches the middle one is lost.",
        spoiled(always, kept(lambda parts: parts[::2] if len(parts) == 3 else parts)),
    ),
    Mutant(
        "fifth-micro-batch-lost",
        13,
        "An update adds up four micro-batches at most.",
        spoiled(always, kept(lambda parts: parts[:4])),
    ),
    Mutant(
        "clip-each-of-many-micro-batches",
        13,
        "With more than two micro-batches, each one's gradient is clipped alone.",
        spoiled(always, clipped_one_by_one),
    ),
    Mutant(
        "magnitude-of-the-last-micro-batch",
        13,
        "DoRA's magnitudes get the gradient of an update's last micro-batch only.",
        spoiled(always, with_the_last_magnitude),
    ),
    Mutant(
        "micro-batches-counted-after-a-stop",
        12,
        "A resumed run counts the micro-batches before the stop as updates, so its schedule is ahead.",
        spoiled(resumed, counted_in_micro_batches),
    ),
    Mutant(
        "loraplus-lost-after-a-stop",
        13,
        "A resumed run updates B at the learning rate of A.",
        spoiled(resumed, without_loraplus),
    ),
    Mutant(
        "clipping-lost-after-a-stop",
        13,
        "A resumed run does not clip its gradients.",
        spoiled(resumed, configured(max_grad_norm=0.0)),
    ),
    Mutant(
        "rslora-lost-after-a-stop",
        13,
        "A resumed run scales by alpha / rank, although it began with rsLoRA.",
        spoiled(resumed, each_linear(without_rslora)),
    ),
    Mutant(
        "scale-of-the-first-in-a-group",
        13,
        "Linears of one input and one rank are scaled together, by the scale of the first.",
        {"mlx_impl.fast.projection.times_scale": by_the_first_of_a_rank},
    ),
    Mutant(
        "dropout-lost-with-a-rank-of-its-own",
        13,
        "A linear whose rank comes from a pattern has no dropout.",
        {"mlx_impl.lora.LoRALinear.__init__": dropping_at_the_default_rank},
    ),
]
