"""What a user loses by each bug: the result of a small job without the bug and with it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_impl import Example, LoRAConfig, LoRATrainer, TrainConfig, load_adapter, merge, save_adapter
from mlx_impl.config import ModelConfig, RopeScaling
from mlx_impl.data import make_batch
from mlx_impl.fast.decode import generate_all
from mlx_impl.generate import generate
from mlx_impl.model import CausalLM
from mlx_impl.run.guard import NotFinite
from tests.trainers.mutants.held_out_again import MUTANTS

CONFIG = ModelConfig(61, 32, 64, 2, 4, 2, 8, 1e-5, 1e4, False)
LORA = LoRAConfig(rank=4, alpha=8.0)
TRAINING = TrainConfig(iters=6, batch_size=2, learning_rate=1e-2)
MATERIAL = 1e-3  # share of the result


def tiny_model(**changes: Any) -> CausalLM:
    """Random weights, large enough that attention is not uniform."""
    mx.random.seed(3)
    model = CausalLM(replace(CONFIG, **changes))
    model.update(tree_map(lambda a: 3 * a if a.ndim == 2 else a, model.parameters()))
    return model


def random_examples(
    lengths: Sequence[int], prompt: int = 2, prefix: int = 0, vocab: int = 61
) -> list[Example]:
    """Random tokens; the first `prefix` are the same in all, the first `prompt` are no targets."""
    random = np.random.default_rng(5)
    common = random.integers(vocab, size=prefix).tolist()
    tokens = [(*common, *random.integers(vocab, size=n - prefix).tolist()) for n in lengths]
    return [Example(t, tuple(i >= prompt for i in range(len(t)))) for t in tokens]


def losses(
    lengths: Sequence[int] = (12, 9, 17, 11, 20, 8),
    lora: LoRAConfig = LORA,
    plain: bool = False,
    model: dict[str, Any] | None = None,
    **training: Any,
) -> list[float]:
    """The loss before each update, and at the end."""
    examples = random_examples(lengths, vocab=(model or {}).get("vocab_size", 61))
    trainer = LoRATrainer(tiny_model(**model or {}), lora, replace(TRAINING, **training), plain=plain)
    return [*(record.loss_nats for record in trainer.fit(examples)), trainer.evaluate(examples)]


def size_of_a() -> float:
    """The length of all A after a run with decay and a schedule."""
    training = replace(TRAINING, iters=30, weight_decay=0.3, lr_schedule="cosine")
    trainer = LoRATrainer(tiny_model(), LORA, training)
    list(trainer.fit(random_examples([12] * 6)))
    return sum(mx.square(a).sum().item() for n, a in factors_of(trainer.model) if n.endswith("lora_a")) ** 0.5


def factors_of(model: CausalLM) -> list[tuple[str, mx.array]]:
    return tree_flatten(model.trainable_parameters())


def losses_of_windows(*batches: Sequence[Example]) -> list[float]:
    """The losses of updates on these batches."""
    trainer = LoRATrainer(tiny_model(), LORA, replace(TRAINING, iters=len(batches)))
    return [record.loss_nats for record in trainer.fit_windows([[make_batch(b)] for b in batches])]


def losses_of_a_prefix_and_none() -> list[float]:
    """Two batches of equal lengths, a common prompt in the first and none in the second."""
    return losses_of_windows(random_examples([15, 12, 9], 4, prefix=8), random_examples([15, 12, 9], 4))


def losses_of_another_row_between() -> list[float]:
    """Rows with a common prompt, and one between them without it."""
    alike, other = random_examples([15, 12], 9, prefix=8), random_examples([16, 16], 9)
    return losses_of_windows([alike[0], other[1], alike[1]])


def rolled_back() -> list[float]:
    """Updates done and the largest factor, after a learning rate that ruins the adapter."""
    trainer = LoRATrainer(tiny_model(), LORA, replace(TRAINING, learning_rate=1e30))
    with suppress(NotFinite):
        list(trainer.fit(random_examples([12] * 4)))
    return [trainer.step, max(mx.abs(a).max().item() for _, a in factors_of(trainer.model))]


def losses_of_a_resumed_run(**model: Any) -> list[float]:
    """Three updates, a stop, three more in a new trainer."""
    examples = random_examples([12, 9, 17, 11])
    with tempfile.TemporaryDirectory() as folder:
        first = LoRATrainer(tiny_model(**model), LORA, TRAINING)
        for record in first.fit(examples):
            if record.step == 3:
                break
        first.save(Path(folder) / "state", examples)
        second = LoRATrainer(tiny_model(**model), LORA, TRAINING)
        second.resume(Path(folder) / "state", examples)
        return [*(record.loss_nats for record in second.fit(examples)), second.evaluate(examples)]


def magnitudes_moved() -> float:
    """How far DoRA's magnitudes are from where they began."""
    training = replace(TRAINING, learning_rate=1e-3, loraplus_lr_ratio=8.0)
    trainer = LoRATrainer(tiny_model(), replace(LORA, use_dora=True), training)
    before = {n: a for n, a in factors_of(trainer.model) if n.endswith("magnitude")}
    list(trainer.fit(random_examples([12] * 4)))
    after = dict(factors_of(trainer.model))
    return max(mx.abs(after[name] - array).max().item() for name, array in before.items())


def quantized_model() -> CausalLM:
    model = tiny_model()
    nn.quantize(model, group_size=32, bits=4)
    return model


def size_of_initial_a() -> list[float]:
    """The largest number of each A on a quantized base, in units of 1 / sqrt(I)."""
    trainer = LoRATrainer(quantized_model(), LORA, TRAINING)
    factors = [a for n, a in factors_of(trainer.model) if n.endswith("lora_a")]
    return [mx.abs(a).max().item() * len(a) ** 0.5 for a in factors[:3]]


def changed_by_rare_dropout() -> float:
    """How far a dropout of 0.001 moves A away from where it is without."""
    ends = []
    for dropout in (0.0, 0.001):
        trainer = LoRATrainer(tiny_model(), replace(LORA, dropout=dropout), TRAINING)
        list(trainer.fit(random_examples([32] * 6)))
        ends.append(dict(factors_of(trainer.model)))
    return max(mx.abs(ends[0][name] - ends[1][name]).max().item() for name in ends[0])


def states_held() -> float:
    """How much memory is in use after 30 updates that was not after 10, in sizes of the factors."""
    trainer, sizes = LoRATrainer(tiny_model(), LORA, replace(TRAINING, iters=30)), {}
    for record in trainer.fit(random_examples([12] * 4)):
        sizes[record.step] = mx.get_active_memory()
    return round((sizes[30] - sizes[10]) / sum(a.nbytes for _, a in factors_of(trainer.model)), 1)


def loss_of_long_answers() -> float:
    """The loss of examples that begin as those trained on, and go on where the cut is."""
    trainer = LoRATrainer(
        tiny_model(), LORA, replace(TRAINING, iters=20, batching="packed", max_seq_length=12)
    )
    list(trainer.fit(random_examples([12] * 4, prefix=12)))
    return trainer.evaluate(random_examples([30] * 4, prefix=12))


def losses_around_a_merge() -> list[float]:
    """The loss of a trained adapter on a quantized base, and that of the merged model."""
    examples = random_examples([12] * 4)
    trainer = LoRATrainer(quantized_model(), LORA, replace(TRAINING, iters=12))
    list(trainer.fit(examples))
    before = trainer.evaluate(examples)
    merge(trainer.model)
    return [before, trainer.evaluate(examples)]


def losses_around_a_file() -> list[float]:
    """The loss of the second adapter saved into one folder, and its loss when it is loaded."""
    examples = random_examples([12] * 4)
    with tempfile.TemporaryDirectory() as folder:
        for lora in (LORA, replace(LORA, alpha=32.0)):
            trainer = LoRATrainer(tiny_model(), lora, TRAINING)
            list(trainer.fit(examples))
            save_adapter(trainer.model, lora, Path(folder), "tiny")
        loaded = tiny_model()
        again = LoRATrainer(loaded, load_adapter(loaded, Path(folder)), TRAINING)
        return [trainer.evaluate(examples), again.evaluate(examples)]


def answer_with_a_window() -> list[int]:
    prompt = random_examples([10])[0].tokens
    return list(generate(tiny_model(sliding_window=4), prompt, 12, ()))


def answers_to_chats() -> list[list[int]]:
    """Answers to prompts that hold the stop token, as the end of an earlier turn."""
    prompts = [(*example.tokens[:6], 7, *example.tokens[6:]) for example in random_examples([10, 10])]
    return generate_all(tiny_model(), prompts, 6, {7})


LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)

EFFECTS: dict[str, Callable[[], Any]] = {
    "llama3-blends-wavelengths": partial(
        losses, [40] * 4, model={"rope_scaling": LLAMA3, "rope_theta": 10.0}
    ),
    "packed-segments-are-a-flag": partial(losses, [7] * 8, batching="packed", max_seq_length=32, plain=True),
    "decay-at-the-peak-rate": size_of_a,
    "kept-positions-remembered-by-the-mask": losses_of_a_prefix_and_none,
    "checkpointed-blocks-share-a-mask": partial(
        losses, lora=replace(LORA, dropout=0.3), grad_checkpoint=True
    ),
    "prefix-of-the-first-and-the-last-row": losses_of_another_row_between,
    "good-before-it-is-known": rolled_back,
    "moments-by-the-layers-name": partial(losses_of_a_resumed_run, num_hidden_layers=12),
    "evaluation-cut-to-a-packed-row": loss_of_long_answers,
    "window-lost-in-packed-rows": partial(
        losses, model={"sliding_window": 3}, batching="packed", max_seq_length=32
    ),
    "loraplus-without-the-magnitude": magnitudes_moved,
    "rslora-by-the-common-rank": partial(
        losses, lora=replace(LORA, use_rslora=True, rank_pattern={"q_proj": 1, "down_proj": 16})
    ),
    "a-bounded-by-the-packed-width": size_of_initial_a,
    "dropout-in-256ths": changed_by_rare_dropout,
    "every-state-kept": states_held,
    "record-written-once": losses_around_a_file,
    "window-forgotten-by-the-cache": answer_with_a_window,
    "stopped-by-the-prompt": answers_to_chats,
}


def is_material(sound: Any, broken: Any) -> bool:
    """Whether two results differ by more than rounding: lists of numbers by their size, all else at all."""
    a, b = np.ravel(sound), np.ravel(broken)
    if a.shape != b.shape or a.dtype.kind not in "fiu":
        return sound != broken
    return bool(np.abs(a - b).max() > MATERIAL * np.abs(a).max())


def short(result: Any) -> str:
    if isinstance(result, float):
        return f"{result:.4g}"
    return "[" + " ".join(map(short, result)) + "]" if isinstance(result, (list, tuple)) else str(result)


def main() -> int:
    hidden = []
    for mutant in MUTANTS:
        sound = EFFECTS[mutant.name]()
        with mutant.planted():
            broken = EFFECTS[mutant.name]()
        if not is_material(sound, broken):
            hidden.append(mutant.name)
        same = " SAME" * (mutant.name in hidden)
        print(f"{mutant.name}: {short(sound)} -> {short(broken)}{same}", flush=True)
    return 1 if hidden else 0


if __name__ == "__main__":
    sys.exit(main())
