"""What a user sees of each planted bug: a result without it, and the result with it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import mlx_impl as ml
from mlx_impl.data import make_batch
from mlx_impl.fast.answer import generate
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM
from mlx_impl.optim import LoRAOptimizer
from mlx_impl.run.sampling import Sampling
from mlx_impl.text.conversation import Conversation
from mlx_impl.text.tokenizer import ChatTokenizer
from mlx_impl.train import batch_loss, to_arrays
from tests.trainers.mutants.held_out_third import MUTANTS

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


def tiny(seed: int = 1, **changes: Any) -> CausalLM:
    mx.random.seed(seed)
    model = CausalLM(ml.ModelConfig(**{**SIZES, **changes}))
    mx.eval(model.parameters())
    return model


def examples_of(lengths: Sequence[int], vocab: int = 40, prompt: int = 2) -> list[ml.Example]:
    """Rows that begin alike and end in targets."""
    random = np.random.default_rng(0)
    start = random.integers(1, vocab, prompt).tolist()
    return [
        ml.Example(
            (*start, *random.integers(1, vocab, length - prompt).tolist()),
            (False,) * prompt + (True,) * (length - prompt),
        )
        for length in lengths
    ]


LENGTHS = (9, 6, 12, 7, 10, 5, 11, 8)


def trained(
    settings: dict[str, Any],
    lora: dict[str, Any] | None = None,
    examples: Sequence[ml.Example] | None = None,
    **model: Any,
) -> tuple[CausalLM, list[ml.StepRecord]]:
    net = tiny(**model)
    training = ml.TrainConfig(**{"iters": 5, "learning_rate": 3e-2, "batch_size": 4, **settings})
    trainer = ml.LoRATrainer(net, ml.LoRAConfig(**{"rank": 2, **(lora or {})}), training)
    return net, list(trainer.fit(examples or examples_of(LENGTHS)))


def losses(*args: Any, **more: Any) -> list[float]:
    return [record.loss_nats for record in trained(*args, **more)[1]]


def rates(settings: dict[str, Any]) -> list[float]:
    return [record.learning_rate for record in trained(settings)[1]]


def targets_of_an_epoch() -> list[int]:
    return [record.num_targets for record in trained({"iters": 3, "batching": "grouped"}, None, NINE)[1]]


NINE = examples_of((*LENGTHS, 9))


def losses_of_one_text_with_other_targets() -> list[float]:
    """Two turns as two examples: the first is trained on one reply, the second on the next."""
    tokens = tuple(range(1, 17))
    turns = [range(5, 8), range(12, 16)]
    rows = [ml.Example(tokens, tuple(t in turn for t in range(16))) for turn in turns]
    return losses({"batch_size": 2}, None, rows)


def trained_factors(**lora: Any) -> list[str]:
    net, _ = trained({"iters": 1}, lora, num_hidden_layers=12)
    return sorted(name for name, _ in tree_flatten(net.trainable_parameters()))


def end_targets() -> list[bool]:
    """Whether each token of a conversation of two turns is a target."""
    words = ["<end>", "user", "assistant", "q1", "a1", "q2", "a2"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="user"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    chat = ChatTokenizer(tokenizer, template, "<end>", "")
    roles = ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")
    messages = tuple({"role": role, "content": content} for role, content in roles)
    (example,) = ml.encode_all(chat, [Conversation(messages, None, "file:1")], "assistant", 100)
    return list(example.is_target)


def partly_quantized() -> list[str]:
    """The linears that train in a model whose first block is quantized and whose second is not."""
    net = tiny(hidden_size=32, intermediate_size=32, head_dim=8)
    nn.quantize(net.model.layers[0], group_size=32, bits=8)
    trainer = ml.LoRATrainer(net, ml.LoRAConfig(rank=2), ml.TrainConfig(iters=1))
    list(trainer.fit(examples_of(LENGTHS)))
    names = {name.rpartition(".")[0] for name, _ in tree_flatten(net.trainable_parameters())}
    return [f"block {block}: {sum(f'layers.{block}.' in name for name in names)}" for block in (0, 1)]


def targets_in_two_runs() -> list[int]:
    """The numbers of targets of windows of one's own, trained in two calls that share them."""
    training = ml.TrainConfig(iters=6, learning_rate=3e-2)
    trainer = ml.LoRATrainer(tiny(), ml.LoRAConfig(rank=2), training)
    windows = iter([[make_batch([example])] for example in examples_of(LENGTHS[:6])])
    records = [*islice(trainer.fit_windows(windows), 3), *trainer.fit_windows(windows)]
    return [record.num_targets for record in records]


def resumed_on_other_weights() -> str:
    examples, lora, training = examples_of(LENGTHS), ml.LoRAConfig(rank=2), ml.TrainConfig(iters=4)
    path = Path(tempfile.mkdtemp()) / "state.safetensors"
    first = ml.LoRATrainer(tiny(1), lora, training)
    list(islice(first.fit(examples), 2))
    first.save(path, examples)
    second = ml.LoRATrainer(tiny(2), lora, training)
    try:
        second.resume(path, examples)
    except ValueError:
        return "refused"
    return f"trained to step {[record.step for record in second.fit(examples)][-1]}"


def merged_error() -> float:
    """How far the merged model's logits are from the adapter's, as a share of the adapter's own change."""
    net, _ = trained({"iters": 10}, {"use_dora": True})
    tokens = mx.arange(12)[None]
    base, adapted = tiny()(tokens), net(tokens)
    ml.merge(net)
    error = mx.linalg.norm(net(tokens) - adapted) / mx.linalg.norm(adapted - base)
    return round(error.item(), 4)


def loaded_from_mlx_lm() -> float:
    """The size of what an adapter of mlx-lm, of rank 4 and scale 20, adds to the logits."""
    net, folder = tiny(), Path(tempfile.mkdtemp())
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    record = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    names = [f"model.layers.{block}.self_attn.q_proj" for block in range(2)]
    factors = {f"{name}.lora_a": mx.random.normal((16, 4)) for name in names}
    factors |= {f"{name}.lora_b": mx.random.normal((4, 16)) / 100 for name in names}
    mx.save_safetensors(str(folder / "adapters.safetensors"), factors)
    tokens = mx.arange(12)[None]
    base = net(tokens)
    ml.load_adapter(net, folder)
    return mx.linalg.norm(net(tokens) - base).item()


def losses_with_answers_between() -> list[float]:
    """In a loop of one's own; `train` itself turns dropout on again before an update."""
    net, (batch,) = tiny(), [to_arrays(make_batch(examples_of(LENGTHS)))]
    add_lora(net, ml.LoRAConfig(rank=2, dropout=0.5))
    optimizer = LoRAOptimizer(ml.TrainConfig(iters=5, learning_rate=3e-2))
    loss_and_grads = nn.value_and_grad(net, lambda model: batch_loss(model, batch)[0])
    found = []
    for update in range(5):
        mx.random.seed(update)
        loss, grads = loss_and_grads(net)
        optimizer.update(net, grads)
        found.append(loss.item())
        list(generate(net, [1, 2, 3], 3, ()))
    return found


def tokens_drawn() -> list[int]:
    """Which tokens follow a prompt in a hundred draws from a nucleus of 0.2."""
    net, drawn = trained({"iters": 10})[0], set()
    mx.random.seed(0)
    for _ in range(100):
        drawn |= set(generate(net, [1, 2, 3], 1, (), Sampling(temperature=1.0, top_p=0.2)))
    return sorted(drawn)


Effect = Callable[[], Any]

EFFECTS: dict[str, Effect] = {
    "rest-of-nothing-is-the-whole-row": partial(losses, {"iters": 2}, vocab_size=1024),
    "attention-scaled-by-the-width": partial(losses, {}, head_dim=16),
    "grouped-in-the-size-of-the-last-batch": targets_of_an_epoch,
    "ends-of-earlier-replies-masked": end_targets,
    "prefix-past-a-rows-last-target": losses_of_one_text_with_other_targets,
    "shared-gradient-in-every-row": partial(losses, {}, None, examples_of(LENGTHS, prompt=4)),
    "end-of-a-name-within-a-number": partial(trained_factors, target_modules=("1.self_attn.q_proj",)),
    "gradients-scaled-up-to-the-limit": partial(losses, {"optimizer": "sgd", "max_grad_norm": 10.0}),
    "schedule-counts-the-warmup": partial(rates, {"warmup_steps": 2, "lr_schedule": "linear"}),
    "recomputed-block-bound-late": partial(losses, {"grad_checkpoint": True}),
    "quantized-linears-without-an-adapter": partly_quantized,
    "window-read-ahead-is-lost": targets_in_two_runs,
    "state-of-another-base-accepted": resumed_on_other_weights,
    "alpha-pattern-lost-beside-a-rank-pattern": partial(
        losses, {}, {"rank_pattern": {"q_proj|v_proj": 4}, "alpha_pattern": {"v_proj": 128.0}}
    ),
    "b-decayed-by-the-rate-of-a": partial(
        losses, {"loraplus_lr_ratio": 16.0, "weight_decay": 1.0, "learning_rate": 1e-2}
    ),
    "magnitude-left-out-of-clipping": partial(
        losses, {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.1}, {"use_dora": True}
    ),
    "dora-merged-by-the-base-length": merged_error,
    "mlx-lm-scale-read-as-alpha": loaded_from_mlx_lm,
    "generation-turns-dropout-off": losses_with_answers_between,
    "nucleus-without-the-token-that-reaches-it": tokens_drawn,
}


def numbers(result: Any) -> np.ndarray | None:
    try:
        return np.asarray(result, np.float64)
    except (TypeError, ValueError):
        return None


def differ(sound: Any, broken: Any) -> bool:
    """Not by rounding: by more than a thousandth somewhere."""
    one, other = numbers(sound), numbers(broken)
    if one is None or other is None or one.shape != other.shape:
        return bool(sound != broken)
    return not np.allclose(one, other, rtol=1e-3, atol=1e-6)


def short(result: Any) -> str:
    if isinstance(result, float):
        return f"{result:.5g}"
    if isinstance(result, list | tuple):
        return "[" + " ".join(map(short, result[:12])) + (" ..." if len(result) > 12 else "") + "]"
    return {True: "1", False: "0"}.get(result, str(result)) if isinstance(result, bool) else str(result)


def main() -> int:
    same = []
    wanted = sys.argv[1:]
    for mutant in MUTANTS:
        if wanted and mutant.name not in wanted:
            continue
        effect = EFFECTS[mutant.name]
        sound = effect()
        with mutant.planted():
            broken = effect()
        print(f"{mutant.name}: {short(sound)} -> {short(broken)}", flush=True)
        if not differ(sound, broken):
            same.append(mutant.name)
    if same:
        print("no difference:", ", ".join(same))
    return 1 if same else 0


if __name__ == "__main__":
    sys.exit(main())
