"""`python -m benchmarks.generation`: answers beside mlx-lm's, with the same random weights, in turn.

A round is one whole answer of each, greedy and without an end: the prompt is read, then tokens are written.
One row is `mlx_lm.generate`'s loop without its text, several rows are its `BatchGenerator`. Both are MLX, so
they share a process and its BLAS. On a GPU a whole answer of each comes first, which compiles the kernels of
every length of the cache. The last columns say what the host does for a token: `host.py`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from .cases import SMALL, TINYLLAMA
from .gate import ratio_of
from .host import host_of_a_token
from .interleave import abba, timed
from .table import shown_seconds
from .worker import call, is_gpu

SMOLLM2 = replace(
    TINYLLAMA,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rope_theta=1e5,
    tie_word_embeddings=True,
)
MODELS = {"smollm2": SMOLLM2, "tinyllama": TINYLLAMA, "small": SMALL}
GROUP_SIZE = 64  # of quantized weights
WARM_UP = 4  # tokens, on a CPU
HOST_TOKENS = 24
HEADINGS = (
    "answers",
    "ours",
    "mlx-lm",
    "ours / its",
    "tokens/s",
    "its",
    "host ms a token, steps: ours",
    "its",
)

Answer = Callable[[int], list[list[int]]]  # of so many new tokens


@dataclass(frozen=True)
class Setting:
    model: str
    dtype: str | None = "float32"  # None: bfloat16 on a GPU
    bits: int = 0  # of quantized weights; 0: not quantized
    prompt: int = 32  # tokens of each row
    rows: int = 1
    tokens: int = 256  # new ones

    def __str__(self) -> str:
        weights = f"{self.bits} bits" if self.bits else str(self.dtype)
        return f"{self.model}, {weights}, {self.rows} x {self.prompt} + {self.tokens}"


def answers_of(setting: Setting) -> tuple[Answer, Answer]:
    """Ours and mlx-lm's, with the same weights and prompts."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    from mlx_impl.model import CausalLM

    config, dtype = MODELS[setting.model], getattr(mx, str(setting.dtype))
    mx.random.seed(0)
    model = CausalLM(config)
    weights = [
        (name, (mx.ones(a.shape) if "norm" in name else 0.02 * mx.random.normal(a.shape)).astype(dtype))
        for name, a in tree_flatten(model.parameters())
    ]
    unknown = ("qkv_bias", "qk_norm", "sliding_window")
    given = {name: value for name, value in asdict(config).items() if name not in unknown}
    theirs = llama.Model(llama.ModelArgs(model_type="llama", **given))
    for each in (model, theirs):
        each.load_weights(weights)
        if setting.bits:
            nn.quantize(each, GROUP_SIZE, setting.bits)
        mx.eval(each.parameters())
    prompts: Any = mx.random.randint(1, config.vocab_size, (setting.rows, setting.prompt)).tolist()
    return partial(our_answer, model, prompts), partial(their_answer, theirs, prompts)


def our_answer(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    from mlx_impl.fast.answer import generate
    from mlx_impl.fast.decode import generate_all
    from mlx_impl.fast.packed_modules import unpacking_first

    if len(prompts) > 1:
        return generate_all(model, prompts, tokens, stop_ids=())
    with unpacking_first(model):
        return [list(generate(model, prompts[0], tokens, stop_ids=()))]


def their_answer(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator, generate_step

    if len(prompts) == 1:
        return [[int(token) for token, _ in generate_step(mx.array(prompts[0]), model, max_tokens=tokens)]]
    generator = BatchGenerator(model, max_tokens=tokens, prefill_batch_size=len(prompts))
    found: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts)}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    generator.close()
    return list(found.values())


def seconds_of(setting: Setting, rounds: int) -> tuple[list[float], list[float]]:
    """The paired seconds of ours and mlx-lm's, after a first answer of each."""
    return paired_seconds(*answers_of(setting), setting.tokens, rounds, most_seconds=None)


def paired_seconds(
    ours: Answer, theirs: Answer, tokens: int, rounds: int, most_seconds: float | None
) -> tuple[list[float], list[float]]:
    """No round begins after `most_seconds`, but two are made."""
    for answer in (ours, theirs):
        answer(tokens if is_gpu() else WARM_UP)
    sides = timed(lambda: ours(tokens)), timed(lambda: theirs(tokens))
    pairs: tuple[list[float], list[float]] = ([], [])
    end = math.inf if most_seconds is None else time.perf_counter() + most_seconds
    while len(pairs[0]) < rounds and (not pairs[0] or time.perf_counter() < end):
        for side, seconds in zip(pairs, abba(*sides, num_pairs=2), strict=True):
            side += seconds
    return pairs


def measure(settings: Sequence[Setting], rounds: int, most_seconds: float | None) -> None:
    """Prints a row of the table for each setting, all in one process."""
    for setting in settings:
        setting = replace(setting, dtype=setting.dtype or ("bfloat16" if is_gpu() else "float32"))
        ours, theirs = answers_of(setting)
        pairs = paired_seconds(ours, theirs, setting.tokens, rounds, most_seconds)
        medians = [statistics.median(side) for side in pairs]
        rates = [f"{setting.rows * setting.tokens / seconds:.0f}" for seconds in medians]
        host = [host_of_a_token(answer, HOST_TOKENS) for answer in (ours, theirs)]
        row = (str(setting), *map(shown_seconds, medians), str(ratio_of(*pairs)), *rates, *host)
        print(f"| {' | '.join(row)} |", flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def models(text: str) -> list[str]:
    names = text.split(",")
    if not MODELS.keys() >= set(names):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(MODELS)}, got {text}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--model", type=models, default=["smollm2"], help=f"of {','.join(MODELS)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--bits", type=numbers, default=[0], help="of weights, such as 0,4; default: 0, none")
    parser.add_argument("--prompts", type=numbers, default=[32], help="tokens of a prompt, such as 32,2048")
    parser.add_argument("--rows", type=numbers, default=[1, 16], help="prompts together; default: 1,16")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens; default: 256")
    parser.add_argument("--rounds", type=int, default=4, help="answers of each, even; default: 4")
    parser.add_argument("--seconds", type=float, help="for a setting, but two rounds at least")
    args = parser.parse_args(arguments)
    settings = [
        Setting(model, args.dtype, bits, prompt, rows, args.tokens)
        for model, bits, prompt, rows in product(args.model, args.bits, args.prompts, args.rows)
    ]
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}", flush=True)
    call(measure, settings, args.rounds, args.seconds)


if __name__ == "__main__":
    main()
