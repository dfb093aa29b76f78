"""The cases that every rung runs on: tiny Llamas in which no two sizes are equal, so that a mix-up shows."""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import pytest

from mlx_impl.config import LoRAConfig, ModelConfig, RopeScaling
from mlx_impl.data import Batch
from reference.lora import add_lora
from reference.model import CausalLM
from tests.derived import UNIT_ROUNDOFF
from tests.lora_ladder.contract import Checked
from tests.lora_ladder.protocol import Arrays, Dialect

T = TypeVar("T")

# kv heads < heads, heads * head_dim != width, a prime vocabulary, no square layer, alpha != rank. The width
# is a multiple of the heads, because transformers' LlamaConfig refuses others.
SPEC = ModelConfig(
    vocab_size=61,
    hidden_size=36,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    tie_word_embeddings=False,
)
LORA = LoRAConfig(rank=3, alpha=7.0)

ARCHITECTURES = {
    "untied": SPEC,
    "tied": replace(SPEC, tie_word_embeddings=True),
    "usual heads": replace(SPEC, num_attention_heads=2, head_dim=18),  # heads * head_dim = width
    "odd heads": replace(SPEC, hidden_size=28),  # 6 heads in a width of 28
    "qkv bias": replace(SPEC, qkv_bias=True),
    "qk norm": replace(SPEC, qk_norm=True),
    "sliding window": replace(SPEC, sliding_window=4),
    "real vocabulary": replace(SPEC, vocab_size=33_013),  # a float32 sum over it loses digits
    "linear rope": replace(SPEC, rope_scaling=RopeScaling("linear", 4.0)),
    # Wavelengths from 6 to 1577, original length 64: some pairs are kept, some blended, some stretched. No
    # number is that of a published model, or a default.
    "llama3 rope": replace(SPEC, rope_scaling=RopeScaling("llama3", 5.0, 2.0, 8.0, 64)),
}
VARIANTS = {
    "lora": LORA,
    "rslora": replace(LORA, use_rslora=True),
    "dora": replace(LORA, use_dora=True),
    "patterns": replace(LORA, rank_pattern={"q_proj": 2, r"1\.mlp\.\w+": 5}, alpha_pattern={"v_proj": 3.0}),
    "some": replace(LORA, target_modules=("q_proj", "mlp.down_proj")),
    "regex": replace(LORA, target_modules=r".*\.0\.self_attn\.[kv]_proj"),
    "all-linear": replace(LORA, target_modules="all-linear"),
    "last layer": replace(LORA, num_layers=1),
}
BIASED_DORA = "dora with bias"  # the only architecture and variant that interact in a formula

every_architecture = pytest.mark.parametrize("case", ARCHITECTURES, indirect=True)
every_variant = pytest.mark.parametrize("case", [*VARIANTS, BIASED_DORA], indirect=True)
every_case = pytest.mark.parametrize(
    "case", [*ARCHITECTURES, *list(VARIANTS)[1:], BIASED_DORA], indirect=True
)

TOKEN_COUNTS = (14, 6, 11)  # rows of unequal length
PROMPT_COUNTS = (5, 3, 9)  # how many tokens of each row are the prompt
UP_OR_DOWN = np.array([0.5, 2.0], dtype=np.float32)


@dataclass(frozen=True)
class Case:
    """A model, an adapter with B != 0, and a batch."""

    name: str
    spec: ModelConfig
    lora: LoRAConfig
    weights: Arrays
    factors: Arrays
    is_bare: bool = False  # the model without its adapter

    def build(self, trainer: Any) -> Any:
        """A trainer whose answers are checked, built from copies of the arrays, which it may overwrite."""
        adapter = (None, None) if self.is_bare else (self.lora, copies(self.factors))
        return Checked(trainer(self.spec, copies(self.weights), *adapter), self.spec.vocab_size)

    def bare(self, weights: Arrays | None = None) -> Case:
        return replace(self, weights=weights or self.weights, is_bare=True)

    @property
    def batch(self) -> Batch:
        return make_batch(random_rows(self.spec.vocab_size, TOKEN_COUNTS), PROMPT_COUNTS)

    @property
    def longest_sum(self) -> int:
        """k: the longest of the sums in a matmul, in the softmax, and in a gradient over the batch."""
        spec = self.spec
        widths = (spec.vocab_size, spec.intermediate_size, spec.num_attention_heads * spec.head_dim)
        return max(*widths, self.batch.inputs_BT.size)

    def with_zero_b(self) -> Case:
        zeroed = {n: v * (not n.endswith("lora_b")) for n, v in self.factors.items()}
        return replace(self, factors=zeroed)

    def with_dropout(self, p: float) -> Case:
        return replace(self, lora=replace(self.lora, dropout=p))

    def moved(self, seed: int, unit: float = UNIT_ROUNDOFF) -> Self:
        """Every weight and factor moved at random by up to sqrt(k / 2) u of itself; zeros stay zero."""
        rng, by = np.random.default_rng(seed), np.sqrt(self.longest_sum / 2) * unit
        weights, factors = (
            {name: x * (1 + by * rng.uniform(-1, 1, x.shape)) for name, x in arrays.items()}
            for arrays in (self.weights, self.factors)
        )
        return replace(self, weights=weights, factors=factors)

    def in_double(self) -> Case:
        """The same case in float64, with digits that float32 cannot hold."""
        return replace(self, weights=with_more_digits(self.weights), factors=with_more_digits(self.factors))


def copies(arrays: Arrays) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}


def with_more_digits(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.float64) * (1 + 2.0**-27) for name, array in arrays.items()}


class Draw:
    """The number of the random weights, factors and rows: `--draw N`. The documents show draw 0."""

    number = 0

    @classmethod
    @contextmanager
    def set_to(cls, number: int) -> Iterator[None]:
        before, cls.number = cls.number, number
        try:
            yield
        finally:
            cls.number = before

    @classmethod
    def rng(cls, seed: int) -> np.random.Generator:
        return np.random.default_rng([seed, cls.number] if cls.number else seed)


def cached_for_each_draw(function: Callable[..., T]) -> Callable[..., T]:
    cached = functools.cache(lambda number, *given: function(*given))
    return functools.wraps(function)(lambda *given: cached(Draw.number, *given))


def random_array(name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Normal numbers that depend only on name, shape and draw, not on what else was drawn."""
    return (Draw.rng(zlib.crc32(name.encode())).standard_normal(shape) * scale).astype(np.float32)


def random_rows(vocab_size: int, token_counts: Sequence[int], seed: int = 3) -> list[list[int]]:
    rng = Draw.rng(seed)
    return [rng.integers(1, vocab_size, n).tolist() for n in token_counts]


def make_batch(rows: Sequence[Sequence[int]], prompt_counts: Sequence[int], width: int = 0) -> Batch:
    """Rows right-padded with 0. Position t predicts token t + 1; targets are the tokens after the prompt."""
    width = max(width, *(len(row) - 1 for row in rows))
    tokens = np.zeros((len(rows), width + 1), dtype=np.int32)
    counts = np.zeros((len(rows), width + 1), dtype=bool)
    for number, (row, prompt_count) in enumerate(zip(rows, prompt_counts, strict=True)):
        tokens[number, : len(row)] = row
        counts[number, prompt_count : len(row)] = True
    num_tokens = sum(len(row) - 1 for row in rows)
    return Batch(tokens[:, :-1], tokens[:, 1:], counts[:, 1:], num_tokens)


def one_prompt_batch(vocab_size: int) -> Batch:
    """Three rows that begin with the same ten tokens, as under one system prompt."""
    prompt, *replies = random_rows(vocab_size, (10, 3, 7, 5))
    return make_batch([prompt + reply for reply in replies], (11, 12, 10))


def common_beginnings(vocab_size: int) -> dict[str, Batch]:
    """Rows of which some begin with the same ten tokens."""
    prompt, *replies = random_rows(vocab_size, (10, 3, 7, 5))
    others = random_rows(vocab_size, (13, 14, 12), seed=47)
    same = [prompt + reply for reply in replies]
    prompts = (11, 12, 10)
    return {
        "all rows": make_batch(same, prompts),
        "all rows, with targets in the beginning": make_batch(same, (4, 11, 6)),
        "the first and the last row": make_batch([same[0], others[1], same[2]], prompts),
        "the first two rows": make_batch([same[0], same[1], others[2]], prompts),
        "all rows but the first": make_batch([others[0], same[1], same[2]], prompts),
        "all rows, one of which is no longer": make_batch([same[0], prompt[:-1], same[2]], (11, 5, 10)),
        "all rows but for their first token": with_other_tokens(same, 0),
        "all rows but for one token in the middle of it": with_other_tokens(same, 4),
        "one text with other targets": one_text_with_other_targets(vocab_size),
    }


def with_other_tokens(rows: Sequence[Sequence[int]], place: int) -> Batch:
    """Rows that are unlike at this place, and go on alike; their replies are targets."""
    changed = [[*row[:place], number, *row[place + 1 :]] for number, row in enumerate(rows, 1)]
    return make_batch(changed, (11, 12, 10))


def one_text_with_other_targets(vocab_size: int) -> Batch:
    """As of a conversation with two turns: one row learns the first reply, the other the second."""
    (text,) = random_rows(vocab_size, (14,), seed=53)
    batch = make_batch([text, text], (3, 9))
    mask_BT = batch.mask_BT.copy()
    mask_BT[0, 6:] = False
    return batch._replace(mask_BT=mask_BT)


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """These rows of a batch, at its full width. Only padding is 0, so the nonzero inputs are the tokens."""
    inputs_BT, targets_BT, mask_BT = (array[list(rows)] for array in batch[:3])
    return Batch(inputs_BT, targets_BT, mask_BT, int(np.count_nonzero(inputs_BT)))


def make_weights(spec: ModelConfig) -> Arrays:
    """Normal weights with standard deviation 0.3; norm weights around one."""
    shapes = {n: tuple(p.shape) for n, p in CausalLM(spec).named_parameters()}
    weights = {name: random_array(name, shape, 0.3) for name, shape in shapes.items()}
    return weights | {name: 1 + weight for name, weight in weights.items() if "norm" in name}


def make_factors(spec: ModelConfig, lora: LoRAConfig, weights: Arrays) -> Arrays:
    """Normal factors with standard deviation 0.2; magnitudes near the lengths of the weight's rows."""
    model = CausalLM(spec)
    add_lora(model, lora)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    factors = {name: random_array(name, shape, 0.2) for name, shape in shapes.items()}
    for name in factors:
        module, _, kind = name.rpartition(".")
        if kind == "magnitude":
            factors[name] = (1 + factors[name]) * np.linalg.norm(weights[f"{module}.weight"], axis=1)
    return factors


@cached_for_each_draw
def named_case(name: str) -> Case:
    spec = ARCHITECTURES.get(name, ARCHITECTURES["qkv bias"] if name == BIASED_DORA else SPEC)
    lora = VARIANTS.get(name, VARIANTS["dora"] if name == BIASED_DORA else LORA)
    weights = make_weights(spec)
    return Case(name, spec, lora, weights, make_factors(spec, lora, weights))


def scale_of(name: str, lora: LoRAConfig, rank: int, dialect: Dialect) -> float:
    """The factor on A B by the published rules: the first pattern that matches a name's end decides."""
    patterns = lora.alpha_pattern.items()
    alpha = next((a for pattern, a in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)), lora.alpha)
    if dialect.scale == "alpha":
        return alpha
    return alpha / (math.sqrt(rank) if lora.use_rslora else rank)


def merged_weights(case: Case, dialect: Dialect) -> Arrays:
    """Weights with which the bare model equals the adapted one, summed in float64."""
    merged = {name: weight.astype(np.float64) for name, weight in case.weights.items()}
    for a_name in [name for name in case.factors if name.endswith("lora_a")]:
        name = a_name.removesuffix(".lora_a")
        a_IR, b_RO = (case.factors[f"{name}.{f}"].astype(np.float64) for f in ("lora_a", "lora_b"))
        scale = scale_of(name, case.lora, a_IR.shape[1], dialect)
        sum_OI = merged[f"{name}.weight"] + scale * (a_IR @ b_RO).T
        if case.lora.use_dora:
            magnitude_O = case.factors[f"{name}.magnitude"]
            sum_OI = (magnitude_O / np.linalg.norm(sum_OI, axis=1))[:, None] * sum_OI
        merged[f"{name}.weight"] = sum_OI
    return merged
