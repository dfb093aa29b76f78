"""What a user loses by each bug: the result of a small run without it and with it.

`python -m tests.trainers.held_out_fourth_effects` prints a line for each bug, and exits with 1 if one changes
nothing.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map
from tokenizers import Tokenizer, models, pre_tokenizers

import mlx_impl as ml
from mlx_impl.config import RopeScaling
from mlx_impl.generate import generate
from mlx_impl.lora import lora_layers
from mlx_impl.model import CausalLM
from mlx_impl.run.guard import NotFinite
from mlx_impl.run.sampling import Sampling
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.trainers.mutants.held_out_fourth import MUTANTS, OF_TWO_TRAINERS

Numbers = list[float]
LEAST = 0.002  # relative difference that counts: rounding is a thousand times smaller
VOCABULARY = 61


def a_model(**changes: Any) -> CausalLM:
    """A random model; `bits` quantizes it, and `dtype` is that of its weights."""
    dtype, bits = changes.pop("dtype", mx.float32), changes.pop("bits", None)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True}
    mx.random.seed(1)
    model = CausalLM(ml.ModelConfig(**sizes | heads | rest | changes))
    # Large enough for attention to matter.
    model.update(tree_map(lambda x: x * 3 if x.ndim == 2 else x, model.parameters()))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    return model


def some_examples(lengths: Sequence[int], seed: int = 0, prompt: Sequence[int] = ()) -> list[ml.Example]:
    """Random tokens after a prompt; the second half of each is its target, or all but the prompt."""
    random = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        tokens = (*prompt, *random.integers(1, VOCABULARY, length).tolist())
        first = len(prompt) or length // 2
        examples.append(ml.Example(tokens, tuple(t >= first for t in range(len(tokens)))))
    return examples


MIXED = (24, 9, 5, 17, 30, 3, 12, 8)


def a_trainer(
    lora: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **more: Any
) -> ml.LoRATrainer:
    """`more` are changes of the model, and the trainer's own `plain` and `compiled`."""
    own = {name: more.pop(name) for name in ("plain", "compiled") if name in more}
    settings = {"iters": 6, "batch_size": 4, "learning_rate": 0.02} | (training or {})
    config = ml.LoRAConfig(**{"rank": 4} | (lora or {}))
    return ml.LoRATrainer(a_model(**more), config, ml.TrainConfig(**settings), **own)


def losses(
    lora: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    examples: Sequence[ml.Example] | None = None,
    **more: Any,
) -> Numbers:
    """The losses that a run reports, and in the end that of its examples, which is computed anew."""
    examples = examples or some_examples(MIXED)
    trainer = a_trainer(lora, training, **more)
    return [*(record.loss_nats for record in trainer.fit(examples)), trainer.evaluate(examples)]


def peak_mib(lora: dict[str, Any], training: dict[str, Any], **more: Any) -> Numbers:
    """The most memory that an update of long rows holds."""
    trainer = a_trainer(lora, {"iters": 2} | training, hidden_size=64, intermediate_size=256, **more)
    mx.eval(trainer.model.parameters())
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    records = list(trainer.fit(some_examples((128,) * 4)))
    return [float((records[-1].peak_bytes - before) >> 20)]


def losses_of_texts() -> Numbers:
    """Training on texts that are longer than the longest row."""
    words = ["<s>", "</s>", *(f"word{i}" for i in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat = ChatTokenizer(tokenizer, None, eos_token="</s>", bos_token="<s>")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        texts = [" ".join(f"word{(i * k) % 40}" for i in range(12)) for k in range(1, 5)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        examples = ml.encode_all(chat, ml.read_conversations(path), targets="all", max_tokens=8)
    return losses(examples=examples)


def losses_after_a_first_token() -> Numbers:
    """Rows that differ in their first token, a language say, and then have one prompt."""
    prompt = list(range(20, 32))
    return losses(examples=[some_examples((4,), seed=k, prompt=[k, *prompt])[0] for k in range(1, 9)])


def loss_after_a_rollback() -> Numbers:
    """A learning rate that ruins the adapter when it has risen; rolled back, the adapter is evaluated."""
    examples = some_examples(MIXED)
    trainer = a_trainer(training={"learning_rate": 1e20, "warmup_steps": 3})
    with suppress(NotFinite):
        list(trainer.fit(examples))
    return [float(trainer.step), trainer.evaluate(examples)]


def losses_of_two_sets() -> Numbers:
    examples, others = some_examples(MIXED), some_examples(MIXED, seed=5)
    trainer = a_trainer()
    list(trainer.fit(examples))
    return [trainer.evaluate(examples), trainer.evaluate(others)]


def losses_resumed_on_the_plain_path() -> Numbers:
    examples = some_examples(MIXED)
    first, second = a_trainer(), a_trainer(plain=True)
    for record in first.fit(examples):
        if record.step == 3:
            break
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "state.safetensors", examples)
        second.resume(Path(folder) / "state.safetensors", examples)
    return [*(record.loss_nats for record in second.fit(examples)), second.evaluate(examples)]


def losses_after_going_back() -> Numbers:
    """Three updates, back to the adapter of the first, and on."""
    examples, kept = some_examples(MIXED), {}
    trainer = a_trainer()
    for record in trainer.fit(examples):
        if record.step == 1:
            kept = tree_map(mx.array, trainer.model.trainable_parameters())
        if record.step == 3:
            break
    trainer.model.update(kept)
    return [*(record.loss_nats for record in trainer.fit(examples)), trainer.evaluate(examples)]


def validations_of_a_compiled_run() -> Numbers:
    examples = some_examples(MIXED)
    trainer = a_trainer(compiled=True)
    before = trainer.validate(examples)
    list(trainer.fit(examples))
    return [before, trainer.validate(examples)]


def saved_and_loaded(lora: dict[str, Any], evaluating: bool = False) -> Numbers:
    """The loss of a trained adapter, and twice that of its file in a new model."""
    examples = some_examples(MIXED)
    trainer, model = a_trainer(lora), a_model()
    list(trainer.fit(examples))
    if evaluating:
        model.eval()
    with tempfile.TemporaryDirectory() as folder:
        ml.save_adapter(trainer.model, trainer.lora, Path(folder), "tiny")
        loaded = ml.load_adapter(model, Path(folder))
    again = ml.LoRATrainer(model, loaded, trainer.training)
    return [trainer.evaluate(examples), again.evaluate(examples), again.evaluate(examples)]


def first_factors() -> Numbers:
    """One number of each A of a run of seed 0, and the loss after six updates."""
    trainer = a_trainer()
    factors = [layer.lora_a[0, 0].item() for layer in lora_layers(trainer.model).values()]
    return [*losses(training={"learning_rate": 0.1})[-1:], *factors]


def loss_of_a_second_merge() -> Numbers:
    """Merged and unmerged after two updates, trained on, merged: the loss without the adapter's code."""
    examples = some_examples(MIXED)
    trainer = a_trainer()
    for record in trainer.fit(examples):
        if record.step == 2:
            ml.unmerge(trainer.model, ml.merge(trainer.model))
    ml.merge(trainer.model)
    return [trainer.evaluate(examples)]


def share_of_the_unlikely() -> Numbers:
    """How many tokens of a bfloat16 model's answer, drawn with top_p 0.5, are not of the likelier half."""
    model = a_model(vocab_size=4096, dtype=mx.bfloat16)
    model.model.embed_tokens.weight *= 0.01
    mx.random.seed(3)
    tokens = [5, *generate(model, [5], 40, (), Sampling(temperature=1.0, top_p=0.5))]
    logits_TV = np.array(model(mx.array([tokens[:-1]]))[0].astype(mx.float32))
    ranks = [(row > row[token]).sum() for row, token in zip(logits_TV, tokens[1:], strict=True)]
    return [float(np.mean(np.array(ranks) > 0.55 * 4096))]


QUERIES_AND_VALUES = {"target_modules": ("q_proj", "v_proj")}
FIRST_BLOCK = {"target_modules": r"model\.layers\.0\..*"}
SCALING = RopeScaling("linear", factor=8.0)
EFFECTS: dict[str, Callable[[], Any]] = {
    "end-token-after-a-cut": losses_of_texts,
    "outputs-in-the-order-of-computing": partial(losses, QUERIES_AND_VALUES),
    "prefix-told-by-the-next-tokens": losses_after_a_first_token,
    "block-without-adapter-is-a-constant": partial(losses, FIRST_BLOCK),
    "group-by-the-beginning-of-a-name": partial(losses, training={"loraplus_lr_ratio": 8.0}, plain=True),
    "reported-loss-is-a-mean-of-means": partial(
        losses, training={"batch_size": 1, "grad_accumulation_steps": 4}
    ),
    "factors-overwritten-beneath-the-rollback": loss_after_a_rollback,
    "evaluation-remembered-for-the-step": losses_of_two_sets,
    "moments-of-a-saved-unturned": losses_resumed_on_the_plain_path,
    "factors-loaded-between-two-fits-are-lost": losses_after_going_back,
    "packed-rows-without-rope-scaling": partial(
        losses, training={"batching": "packed", "max_seq_length": 32}, rope_scaling=SCALING, plain=True
    ),
    "dora-length-without-the-offsets": partial(losses, {"use_dora": True}, bits=4),
    "compiled-evaluation-keeps-the-factors": validations_of_a_compiled_run,
    "mode-set-where-it-changes": partial(saved_and_loaded, {"dropout": 0.5}, evaluating=True),
    "initial-factors-by-hash-order": first_factors,
    "scales-of-their-own-widen": partial(
        peak_mib, {"alpha_pattern": {"q_proj": 8.0, "up_proj": 8.0}}, {}, dtype=mx.bfloat16
    ),
    "only-adapted-blocks-checkpointed": partial(
        peak_mib, FIRST_BLOCK, {"grad_checkpoint": True}, num_hidden_layers=8
    ),
    "delta-of-the-first-merge": loss_of_a_second_merge,
    "alpha-pattern-cut-to-a-name": partial(
        saved_and_loaded, {"alpha_pattern": {"layers.0.self_attn.q_proj": 64.0, "layers.1.mlp.up_proj": 64.0}}
    ),
    "nucleus-summed-in-the-models-type": share_of_the_unlikely,
}


def differ(sound: Numbers, broken: Numbers) -> bool:
    pairs = list(zip(sound, broken, strict=False))
    return len(sound) != len(broken) or any(
        math.isnan(a) != math.isnan(b) or abs(a - b) > LEAST * max(abs(a), abs(b)) for a, b in pairs
    )


def short(numbers: Numbers) -> str:
    return "[" + " ".join(f"{number:.4g}" for number in numbers[:1] + numbers[1:][-3:]) + "]"


def main() -> int:
    unchanged = 0
    for mutant in (*MUTANTS, *OF_TWO_TRAINERS):
        effect = EFFECTS[mutant.name]
        sound, again = effect(), effect()
        with mutant.planted():
            broken = effect()
        is_shown = differ(sound, broken) and not differ(sound, again)
        unchanged += not is_shown
        print(mutant.name, short(sound), "->", short(broken), "" if is_shown else "UNCHANGED", flush=True)
    return int(unchanged > 0)


if __name__ == "__main__":
    sys.exit(main())
