"""What a user sees with each bug of `held_out.py`: `python -m tests.trainers.held_out_effects`."""

from __future__ import annotations

import random
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
from mlx.utils import tree_flatten

from mlx_impl import LoRAConfig, LoRATrainer, ModelConfig, TrainConfig, encode_all, load_adapter, save_adapter
from mlx_impl.data import Example
from mlx_impl.fast.decode import generate_all
from mlx_impl.generate import generate
from mlx_impl.model import CausalLM
from mlx_impl.run import merging
from mlx_impl.run.guard import NotFinite
from mlx_impl.run.sampling import Sampling
from mlx_impl.text.conversation import Conversation
from mlx_impl.text.tokenizer import ChatTokenizer
from tests.trainers.mutants.held_out import MUTANTS

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
Settings = dict[str, Any]


def tiny(dtype: Any = mx.float32, bits: int = 0, **changes: Any) -> CausalLM:
    """A tiny model with weights large enough to matter."""
    mx.random.seed(3)
    model = CausalLM(ModelConfig(**SIZES | changes))
    weights = [
        (name, mx.random.normal(array.shape) * 0.3) for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights([(name, 1 + array if "norm" in name else array) for name, array in weights])
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model.model, 32, bits, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    mx.eval(model.parameters())
    return model


def example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    return Example((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


def some(
    count: int = 6, least: int = 4, most: int = 14, prompt: Sequence[int] = (), seed: int = 0
) -> list[Example]:
    """Questions and answers of random tokens, of several lengths, after a common prompt."""
    r = random.Random(seed)
    lengths = [r.randint(least, most) for _ in range(count)]
    return [
        example([*prompt, *r.choices(range(64), k=n // 2)], r.choices(range(64), k=n - n // 2))
        for n in lengths
    ]


DEFAULT_LORA: Settings = {"rank": 4}


def trainer(model: Settings | None = None, lora: Settings | None = None, **training: Any) -> LoRATrainer:
    switches = {name: training.pop(name) for name in ("plain", "compiled") if name in training}
    settings = TrainConfig(**{"iters": 4, "batch_size": 3, "learning_rate": 0.02} | training)
    return LoRATrainer(tiny(**model or {}), LoRAConfig(**DEFAULT_LORA | (lora or {})), settings, **switches)


def factors(model: CausalLM) -> np.ndarray:
    return np.concatenate(
        [np.array(array).ravel() for _, array in tree_flatten(model.trainable_parameters())]
    )


# ---- what a user does


def losses(examples: list[Example], **settings: Any) -> list[float]:
    """The losses of a run, and the validation loss after it."""
    run = trainer(**settings)
    return [*(record.loss_nats for record in run.fit(examples)), run.evaluate(some(3, seed=9))]


def adapter(examples: list[Example], **settings: Any) -> np.ndarray:
    """The trained factors."""
    run = trainer(**settings)
    list(run.fit(examples))
    return factors(run.model)


def after_nan(examples: list[Example], stop: int = 0) -> list[float]:
    """The step and the norm of the factors after a huge weight decay ruined a run, resumed at `stop`."""
    settings: dict[str, Any] = {"weight_decay": 1e9, "iters": 20}
    run = trainer(**settings)
    if stop:
        run = resumed(run, examples, stop, settings)
    with suppress(NotFinite):
        list(run.fit(examples))
    return [run.step, float(np.linalg.norm(factors(run.model)))]


def resumed(run: LoRATrainer, examples: list[Example], stop: int, settings: Settings) -> LoRATrainer:
    """A new trainer that goes on where `run`, validated at each update, was saved after `stop` updates."""
    for record in run.fit(examples):
        run.validate(examples)
        if record.step == stop:
            break
    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder) / "state", examples)
        run = trainer(**settings)
        run.resume(Path(folder) / "state", examples)
    return run


def resumed_losses(examples: list[Example], **settings: Any) -> list[float]:
    return [record.loss_nats for record in resumed(trainer(**settings), examples, 2, settings).fit(examples)]


def history(examples: list[Example], **settings: Any) -> list[int]:
    return [step for step, _ in resumed(trainer(**settings), examples, 3, settings).validation]


def accepted(examples: list[Example]) -> bool:
    """Whether a run is resumed with the same tokens and other targets."""
    run = trainer()
    next(run.fit(examples))
    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder) / "state", examples)
        try:
            trainer().resume(
                Path(folder) / "state", [Example(e.tokens, (True,) * len(e.tokens)) for e in examples]
            )
        except ValueError:
            return False
    return True


def trained_twice(examples: list[Example]) -> list[float]:
    """The losses of two trainers, one after the other on the same model."""
    run = trainer()
    first = [record.loss_nats for record in run.fit(examples)]
    again = LoRATrainer(run.model, run.lora, run.training)
    return first + [record.loss_nats for record in again.fit(examples)]


def validations(examples: list[Example], **settings: Any) -> list[float]:
    """The validation losses before the first and after each update."""
    run = trainer(**settings)
    return [run.validate(examples), *(run.validate(examples) for _ in run.fit(examples))]


def logits_after_evaluation(examples: list[Example]) -> np.ndarray:
    """The logits of a model in evaluation, whose loss was computed meanwhile."""
    run = trainer(lora={"dropout": 0.5})
    list(run.fit(examples))
    run.model.eval()
    run.evaluate(examples)
    return np.array(run.model(mx.array([examples[0].tokens])))


def growth(examples: list[Example]) -> int:
    """By how many MiB the memory in use grows over twenty updates."""
    run = trainer(lora={"rank": 16}, iters=24)
    used = [mx.get_active_memory() for _ in run.fit(examples)]
    return round((used[-1] - used[3]) / 2**20)


def merged_logits(examples: list[Example], **settings: Any) -> np.ndarray:
    run = trainer(**settings)
    list(run.fit(examples))
    merging.merge(run.model)
    return np.array(run.model(mx.array([examples[0].tokens])))


def merged_between(examples: list[Example], **settings: Any) -> list[float]:
    """The losses of a run whose adapter is merged and unmerged after every update."""
    run, seen = trainer(**settings), []
    for record in run.fit(examples):
        seen.append(record.loss_nats)
        merging.unmerge(run.model, merging.merge(run.model))
    again = LoRATrainer(run.model, run.lora, run.training)
    return [*seen, *(record.loss_nats for record in again.fit(examples))]


def loaded_logits(examples: list[Example], **settings: Any) -> Any:
    """The logits of a new model with the saved adapter, or why it cannot be loaded."""
    run, model = trainer(**settings), tiny()
    list(run.fit(examples))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(run.model, run.lora, Path(folder), "base")
        try:
            load_adapter(model, Path(folder))
        except ValueError as error:
            return str(error).rpartition("/")[2]
    return np.array(model(mx.array([examples[0].tokens])))


def answers(prompts: list[list[int]], stop_ids: tuple[int, ...] = (), **changes: Any) -> list[list[int]]:
    return generate_all(tiny(**changes), prompts, 12, stop_ids)


def one_answer(**changes: Any) -> list[int]:
    return list(generate(tiny(**changes), [1, 2, 3], 12, ()))


def words_drawn() -> int:
    """How many different first tokens two hundred sampled answers have."""
    model, choose = tiny(), Sampling(temperature=3.0, top_p=0.7)
    mx.random.seed(0)
    return len({next(generate(model, [1, 2, 3], 1, (), choose)) for _ in range(200)})


def tokens_seen(examples: list[Example], **settings: Any) -> int:
    """How many tokens the records of a run add up to."""
    return sum(record.num_tokens for record in trainer(**settings).fit(examples))


def text_examples() -> list[Example]:
    """The tokens that a text is trained on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"the": 0, "end": 1, "eos": 2, "unk": 3}, unk_token="unk"))
    words.pre_tokenizer = Whitespace()
    tokenizer = ChatTokenizer(words, None, "eos", "unk")
    return encode_all(tokenizer, [Conversation((), None, "a:1", text="the end")], "all", 99)


PROMPT = list(range(20, 32))
ALIKE = [example([*PROMPT, n], [n + 7, n + 9, n + 1]) for n in (1, 3, 5)]
MIXED = [ALIKE[0], example([*PROMPT[:4], *range(40, 48), 6], [7, 8]), ALIKE[2]]
TEXTS = [Example((*PROMPT, n, n + 2), (True,) * 14) for n in (1, 3, 5)]
LONG = some(12, 60, 120)
UNEVEN = [example(range(n), (n, n + 9)) for n in (13, 2, 3, 14, 5, 9, 4, 13, 6)]

EFFECTS: dict[str, Callable[[], Any]] = {
    "last-batch-filled-from-the-beginning": partial(adapter, some(5)),
    "texts-without-their-end": text_examples,
    "prefix-of-the-first-and-last-row": partial(losses, MIXED),
    "first-512-targets-of-a-batch": partial(losses, LONG, batch_size=12),
    "packed-positions-of-the-first-row": partial(
        losses, some(8), batching="packed", max_seq_length=24, plain=True
    ),
    "packed-without-window": partial(
        losses, some(8), batching="packed", max_seq_length=24, model={"sliding_window": 3}, plain=True
    ),
    "packed-segments-kept-by-shape": partial(
        losses, some(12), batching="packed", max_seq_length=24, batch_size=1, iters=6
    ),
    "kept-positions-kept-by-shape": partial(losses, UNEVEN),
    "dummy-gets-a-gradient": partial(adapter, ALIKE, optimizer="sgd"),
    "shared-targets-assigned-not-added": partial(adapter, TEXTS, optimizer="sgd"),
    "queries-and-keys-share-a-norm": partial(losses, some(), model={"qk_norm": True}),
    "logsumexp-padded-with-zeros": partial(losses, some(), plain=True, model={"vocab_size": 600}),
    "rslora-of-the-default-rank": partial(
        losses, some(), lora={"use_rslora": True, "rank_pattern": {"q_proj": 16}}
    ),
    "num-layers-lost-with-an-expression": partial(
        adapter, some(), lora={"target_modules": r".*\.(q|v)_proj", "num_layers": 1}
    ),
    "scales-in-equal-shares": partial(losses, some(), lora={"rank_pattern": {"q_proj": 2, "v_proj": 8}}),
    "quantized-base-detached": partial(adapter, some(), model={"bits": 4}),
    "magnitude-not-decayed": partial(losses, some(), lora={"use_dora": True}, weight_decay=1.0),
    "decay-by-the-peak-rate": partial(adapter, some(), weight_decay=1.0, warmup_steps=4),
    "rate-zero-is-the-peak": partial(losses, some(), warmup_steps=2),
    "tokens-of-the-last-micro-batch": partial(tokens_seen, some(), grad_accumulation_steps=2),
    "moments-forgotten-at-each-epoch": partial(losses, some()),
    "checkpointed-layers-share-masks": partial(losses, some(), lora={"dropout": 0.5}, grad_checkpoint=True),
    "compiled-keeps-the-first-layout": partial(losses, UNEVEN, compiled=True),
    "rollback-of-the-optimizer-alone": partial(after_nan, some()),
    "rollback-to-before-the-resume": partial(after_nan, some(), stop=1),
    "validations-not-resumed": partial(history, some()),
    "resumed-with-other-targets": partial(accepted, some()),
    "moments-in-the-order-of-names": partial(resumed_losses, some()),
    "loaded-adapter-begins-again": partial(trained_twice, some()),
    "dora-length-of-the-first-evaluation": partial(validations, some(), lora={"use_dora": True}),
    "evaluation-leaves-dropout-on": partial(logits_after_evaluation, some()),
    "every-snapshot-kept": partial(growth, some()),
    "merged-without-bias": partial(merged_logits, some(), model={"qkv_bias": True}),
    "merged-and-quantized-again": partial(merged_logits, some(), model={"bits": 4}),
    "magnitudes-frozen-by-unmerging": partial(merged_between, some(), lora={"use_dora": True}),
    "dora-not-saved": partial(loaded_logits, some(), lora={"use_dora": True}),
    "causal-from-the-top-left": partial(answers, [[*PROMPT, *range(n, n + 4)] for n in (1, 2, 3)]),
    "one-token-needs-no-mask": partial(one_answer, sliding_window=4),
    "ended-by-the-prompt": partial(answers, [[1, 2, 3], [4, 63, 5]], stop_ids=(63,)),
    "nucleus-before-temperature": words_drawn,
}

# ---- the comparison


def distance(one: Any, other: Any) -> float:
    """How far two results are apart, relative to the first; 1 for results of another kind or shape."""
    if type(one) is not type(other):
        return 1.0
    if isinstance(one, (float, int, np.ndarray, list)) and not isinstance(one, bool):
        try:
            a, b = np.array(one, float), np.array(other, float)
        except (ValueError, TypeError):
            return float(one != other)
        if a.shape != b.shape:
            return 1.0
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float(not np.array_equal(a, b, equal_nan=True))
        return float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(a)), 1e-9)
    return float(one != other)


def short(result: Any) -> str:
    if isinstance(result, np.ndarray):
        return f"norm {np.linalg.norm(result):.4g}"
    if isinstance(result, float):
        return f"{result:.5g}"
    if isinstance(result, list) and result and all(isinstance(x, float) for x in result):
        return " ".join(f"{x:.4g}" for x in result)
    return str(result)[:110]


def main(names: Sequence[str]) -> int:
    same = []
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        sound = EFFECTS[mutant.name]()
        with mutant.planted():
            broken = EFFECTS[mutant.name]()
        apart = distance(sound, broken)
        print(f"{mutant.name}: {short(sound)} -> {short(broken)} ({apart:.2g} apart)", flush=True)
        if apart < LEAST or distance(sound, EFFECTS[mutant.name]()) > 1e-6:
            same.append(mutant.name)
    if same:
        print("no difference, or none that stays:", ", ".join(same))
    return bool(same)


LEAST = 1e-3  # a difference that rounding does not make

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
