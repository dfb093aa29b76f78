"""What a user loses by each bug: a small run through the public API, without the bug and with it.

`python -m tests.trainers.held_out_fifth_effects` prints a line for each, and exits with 1 if a result does
not change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import Tokenizer, models, pre_tokenizers

from mlx_impl import (
    Example,
    LoadedModel,
    LoRAConfig,
    LoRATrainer,
    ModelConfig,
    TrainConfig,
    answer,
    load_adapter,
    merge,
    save_adapter,
)
from mlx_impl.config import RopeScaling
from mlx_impl.fast.decode import generate_all
from mlx_impl.lora import lora_parameters
from mlx_impl.model import CausalLM
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.trainers.mutants.held_out_fifth import MUTANTS

MATERIAL = 0.01  # the least relative change that counts
TINY = ModelConfig(61, 32, 64, 2, 4, 2, 8, 1e-5, 1e4, False)
LORA = LoRAConfig(rank=4, alpha=16.0)
TRAINING = TrainConfig(iters=8, batch_size=2, learning_rate=2e-2)
EIGHT = (9, 5, 7, 6, 9, 4, 8, 6)  # tokens of eight examples


def random_model(config: ModelConfig = TINY) -> CausalLM:
    """Weights twice as large as usual, so that attention looks at some tokens more than at others."""
    model, random = CausalLM(config), np.random.default_rng(1)
    named = [
        (name, mx.array(random.normal(size=x.shape) * (2 * x.shape[-1] ** -0.5 if x.ndim > 1 else 1)))
        for name, x in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten([(name, x.astype(mx.float32)) for name, x in named]))
    return model


def random_examples(lengths: Sequence[int], tokens: range = range(1, 61)) -> list[Example]:
    """The second half of each example are targets."""
    random = np.random.default_rng(2)
    return [
        Example(
            tuple(random.choice(tokens, n).tolist()),
            (False,) * (n // 2) + (True,) * (n - n // 2),
        )
        for n in lengths
    ]


def trained(
    lengths: Sequence[int] = EIGHT,
    config: ModelConfig = TINY,
    lora: LoRAConfig = LORA,
    training: TrainConfig = TRAINING,
    tokens: range = range(1, 61),
    **more: Any,
) -> tuple[LoRATrainer, list[float]]:
    trainer = LoRATrainer(random_model(config), lora, training, **more)
    return trainer, [record.loss_nats for record in trainer.fit(random_examples(lengths, tokens))]


def losses(**settings: Any) -> list[float]:
    """The loss of every update."""
    return trained(**settings)[1]


def losses_on_quantized() -> list[float]:
    """Of a 4-bit model whose queries, keys and values have biases, with an adapter elsewhere."""
    model = random_model(replace(TINY, qkv_bias=True))
    nn.quantize(model, group_size=32, bits=4)
    trainer = LoRATrainer(model, replace(LORA, target_modules=("o_proj",)), TRAINING)
    return [record.loss_nats for record in trainer.fit(random_examples(EIGHT))]


def losses_of_a_second_model() -> list[float]:
    """Of a model with RoPE scaling, after one without was trained in the same process."""
    losses()
    return losses(lengths=(24,) * 8, config=replace(TINY, rope_scaling=RopeScaling("linear", 8.0)))


def losses_of_a_validated_run() -> list[float]:
    """Of a run that looks at the loss on its own examples after each update."""
    trainer, examples = LoRATrainer(random_model(), LORA, TRAINING), random_examples(EIGHT)
    found = []
    for record in trainer.fit(examples):
        found.append(record.loss_nats)
        trainer.validate(examples)
    return found


def losses_after_a_stop() -> list[float]:
    """Of the updates after a run was stopped within an epoch, saved and resumed."""
    training, examples = replace(TRAINING, batch_size=1, grad_accumulation_steps=2), random_examples(EIGHT)
    first = LoRATrainer(random_model(), LORA, training)
    for record in first.fit(examples):
        if record.step == 2:
            break
    with TemporaryDirectory() as folder:
        path = Path(folder, "state.safetensors")
        first.save(path, examples)
        second = LoRATrainer(random_model(), LORA, training)
        second.resume(path, examples)
    return [record.loss_nats for record in second.fit(examples)]


def loss_afterwards(**settings: Any) -> float:
    """On other examples, after training."""
    trainer, _ = trained(**settings)
    return trainer.evaluate(random_examples((32,) * 8))


def size_of_a(**settings: Any) -> float:
    """The norm of all A of the trained adapter."""
    trainer, _ = trained(**settings)
    factors = lora_parameters(trainer.model).items()
    return sum(mx.square(x).sum().item() for name, x in factors if name.endswith("lora_a")) ** 0.5


def distinct_masks() -> int:
    """How many of 60 updates have a loss of their own, on one example, where dropout alone changes it."""
    lora, training = replace(LORA, dropout=0.5), replace(TRAINING, learning_rate=0.05)
    trainer, _ = trained((12,), lora=lora, training=training)
    still = LoRATrainer(trainer.model, lora, replace(training, iters=60, learning_rate=0.0))
    return len({record.loss_nats for record in still.fit(random_examples((12,)))})


def peak_megabytes(**settings: Any) -> float:
    """The most memory that training held."""
    mx.clear_cache()
    mx.reset_peak_memory()
    trained(**settings)
    return mx.get_peak_memory() / 2**20


def loss_when_merged(**settings: Any) -> float:
    trainer, _ = trained(**settings)
    merge(trainer.model)
    return trainer.evaluate(random_examples(EIGHT))


def loss_when_loaded(**settings: Any) -> float:
    """Of the saved adapter in another copy of the model."""
    trainer, _ = trained(**settings)
    with TemporaryDirectory() as folder:
        save_adapter(trainer.model, trainer.lora, Path(folder), "base")
        model = random_model()
        config = load_adapter(model, Path(folder))
    return LoRATrainer(model, config, TRAINING).evaluate(random_examples(EIGHT))


def sampled_answer() -> str:
    """Of a model that thinks all words about equally likely."""
    words = {str(number): number for number in range(60)} | {"</s>": 60}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    chat = ChatTokenizer(tokenizer, None, "</s>", "<s>")
    trainer, _ = trained()
    return answer(LoadedModel("tiny", trainer.model, chat, Path()), "1 2 3", 12, temperature=30.0, seed=3)


def answers_after_more_training() -> list[list[int]]:
    """To prompts that were asked before as well, halfway."""
    trainer, examples = LoRATrainer(random_model(), LORA, TRAINING), random_examples(EIGHT)
    prompts = [[7, 8, 9, 10, 11, 12, last] for last in (1, 2, 3, 4)]
    for record in trainer.fit(examples):
        if record.step in (1, 8):
            answers = generate_all(trainer.model, prompts, 6, ())
    return answers


EFFECTS: dict[str, Callable[[], Any]] = {
    "keys-learn-from-one-query-head": losses,
    "norm-of-all-heads-together": partial(losses, config=replace(TINY, qk_norm=True)),
    "rope-frequencies-of-the-first-model": losses_of_a_second_model,
    "batches-share-a-buffer": partial(losses, training=replace(TRAINING, grad_accumulation_steps=2)),
    "packed-told-by-the-first-row": partial(
        losses,
        lengths=(17, 17, *EIGHT),
        training=replace(TRAINING, batching="packed", max_seq_length=16),
    ),
    "window-one-short-of-the-row": partial(losses, lengths=(9,) * 8, config=replace(TINY, sliding_window=7)),
    "batches-remembered-by-their-numbers": partial(loss_afterwards, plain=True),
    "padding-row-zeroed": partial(losses, tokens=range(6)),
    "constant-schedule-without-warmup": partial(losses, training=replace(TRAINING, warmup_steps=6)),
    "sgd-without-decay": partial(
        size_of_a, training=replace(TRAINING, iters=20, optimizer="sgd", learning_rate=0.1, weight_decay=0.1)
    ),
    "evaluation-sorts-the-callers-list": losses_of_a_validated_run,
    "resumed-by-batches": losses_after_a_stop,
    "bias-of-a-quantized-linear-lost": losses_on_quantized,
    "dropout-seeded-by-a-byte": distinct_masks,
    "checkpointing-left-out-with-dropout": partial(
        peak_megabytes,
        lengths=(257,) * 4,
        config=replace(TINY, num_hidden_layers=8),
        lora=replace(LORA, dropout=0.1),
        training=replace(TRAINING, iters=2, batch_size=4, grad_checkpoint=True),
    ),
    "merged-as-if-dropout-were-not-rescaled": partial(loss_when_merged, lora=replace(LORA, dropout=0.3)),
    "rslora-folded-into-alpha": partial(
        loss_when_loaded, lora=replace(LORA, use_rslora=True, rank_pattern={"q_proj": 1, "down_proj": 16})
    ),
    "tokens-drawn-with-one-key": sampled_answer,
    "prefix-cache-outlives-an-update": answers_after_more_training,
}


def differ(one: Any, other: Any) -> bool:
    """Materially, and not by rounding."""
    if not isinstance(one, (int, float)) and not (isinstance(one, list) and isinstance(one[0], float)):
        return one != other
    a, b = np.atleast_1d(one).astype(float), np.atleast_1d(other).astype(float)
    return a.shape != b.shape or bool((np.abs(a - b) > MATERIAL * np.abs(a)).any())


def short(result: Any) -> str:
    if isinstance(result, float):
        return f"{result:.4g}"
    if isinstance(result, list) and isinstance(result[0], float):
        return "... " + " ".join(f"{number:.3f}" for number in result[-4:])
    return str(result)


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    without_effect = 0
    for mutant in chosen:
        effect = EFFECTS[mutant.name]
        sound = effect()
        with mutant.planted():
            broken = effect()
        mark = "" if differ(sound, broken) else "  NO EFFECT"
        without_effect += bool(mark)
        print(f"{mutant.name}: {short(sound)} -> {short(broken)}{mark}", flush=True)
    return 1 if without_effect else 0


if __name__ == "__main__":
    sys.exit(main())
