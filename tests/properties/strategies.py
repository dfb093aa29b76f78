"""The Hypothesis strategies: they draw shapes, switches, counts and seeds. Arrays are generated from a seed.

All sizes are small and shrink, so that the smallest failing model is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from mlx_impl.config import BLOCK_LINEARS, LoRAConfig, ModelConfig, RopeScaling, TrainConfig
from mlx_impl.data import Batch
from reference.lora import add_lora
from reference.model import CausalLM
from tests.lora_ladder.cases import Case, make_batch
from tests.lora_ladder.protocol import Arrays

VOCABULARIES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)  # primes, to differ from other sizes
DYADIC_RATES = tuple(
    2.0**-n for n in range(4, 11)
)  # MLX keeps learning rates in float32, which holds these exactly
MAX_TOKENS = 12
SEEDS = st.integers(0, 2**32 - 1)

# For planted bugs: draw until an example fails, deterministically and without shrinking.
HUNT = settings(
    max_examples=200,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Brief:
    """Keeps arrays out of what Hypothesis prints for a failing example."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


class DrawnBatch(Brief, Batch):
    def __repr__(self) -> str:
        return f"Batch{self.inputs_BT.shape} with {self.mask_BT.sum(axis=1).tolist()} targets"


@dataclass(frozen=True, kw_only=True, repr=False)
class Drawn(Brief, Case):
    """A model, an adapter and a batch of any shape."""

    drawn_batch: Batch
    seed: int  # the seed of the arrays

    def __repr__(self) -> str:
        return f"Drawn({self.spec}, {self.lora}, {self.drawn_batch}, arrays of seed {self.seed})"

    @property
    def batch(self) -> Batch:
        return self.drawn_batch


def rope_scalings() -> st.SearchStrategy[RopeScaling | None]:
    """The original length is short, so some frequencies are kept, some blended and some stretched."""
    factors = st.sampled_from([2.0, 8.0])
    return st.one_of(
        st.none(),
        st.builds(RopeScaling, st.just("linear"), factors),
        st.builds(
            RopeScaling,
            st.just("llama3"),
            factors,
            original_max_position_embeddings=st.sampled_from([16, 64]),
        ),
    )


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Heads are a multiple of key/value heads; width and heads * head_dim are independent."""
    num_kv_heads = draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=draw(st.sampled_from(VOCABULARIES)),
        hidden_size=draw(st.integers(3, 21)),
        intermediate_size=draw(st.integers(3, 25)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 5)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, 1, 3, 8])),
        rope_scaling=draw(rope_scalings()),
    )


def smaller_side(model: ModelConfig) -> int:
    """The smallest dimension of any linear: the highest rank that every linear can have."""
    widths = (model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim)
    return min(model.hidden_size, model.intermediate_size, *widths)


@st.composite
def lora_configs(draw: st.DrawFn, model: ModelConfig) -> LoRAConfig:
    """Targets by name suffixes, by a regular expression, or all linears; with rank and alpha patterns."""
    ranks, alphas = st.integers(1, smaller_side(model)), st.sampled_from([0.5, 1.0, 3.0, 16.0])
    names = draw(st.lists(st.sampled_from(BLOCK_LINEARS), min_size=1, unique=True))
    expression = rf".*\.({'|'.join(names)})"
    every_target: st.SearchStrategy[tuple[str, ...] | str] = st.one_of(
        st.just(tuple(names)), st.just(expression), st.just("all-linear")
    )
    patterns = st.sampled_from([names[0], rf"\w+\.{names[-1]}", rf"layers\.\d\.\w+\.{names[0]}"])
    return LoRAConfig(
        rank=draw(ranks),
        alpha=draw(alphas),
        target_modules=draw(every_target),
        num_layers=draw(st.sampled_from([-1, *range(1, model.num_hidden_layers + 1)])),
        use_rslora=draw(st.booleans()),
        use_dora=draw(st.booleans()),
        rank_pattern=draw(st.dictionaries(patterns, ranks, max_size=2)),
        alpha_pattern=draw(st.dictionaries(patterns, alphas, max_size=2)),
    )


@st.composite
def batches(draw: st.DrawFn, model: ModelConfig) -> Batch:
    """Rows of unequal length with any number of targets, even none, but one in the batch; some padding.

    In half of the batches all rows have a common prefix, like a shared system prompt.
    """
    num_shared = draw(st.sampled_from([0, 9]))
    lengths = st.integers(num_shared + 2, MAX_TOKENS)
    token_counts = draw(st.lists(lengths, min_size=1, max_size=4))
    prompt_counts = [draw(st.integers(1, count)) for count in token_counts]
    if prompt_counts == token_counts:
        prompt_counts[0] = 1  # in one row every token after the first is a target
    rng = np.random.default_rng(draw(SEEDS))
    rows = [rng.integers(1, model.vocab_size, count).tolist() for count in token_counts]
    rows = [rows[0][:num_shared] + row[num_shared:] for row in rows]
    return DrawnBatch(*make_batch(rows, prompt_counts, width=draw(st.sampled_from([0, MAX_TOKENS + 2]))))


def make_arrays(model: ModelConfig, lora: LoRAConfig, seed: int) -> tuple[Arrays, Arrays]:
    """Weights with standard deviation 0.3, norms near 1, factors with 0.2, magnitudes near rows' lengths."""
    rng = np.random.default_rng(seed)
    network = CausalLM(model)
    weights = {
        name: normal(rng, p.shape, 0.3) + np.float32("norm" in name) for name, p in network.named_parameters()
    }
    add_lora(network, lora)
    trained = {name: p.shape for name, p in network.named_parameters() if p.requires_grad}
    factors = {name: normal(rng, shape, 0.2) for name, shape in trained.items()}
    for name in factors:
        module, _, kind = name.rpartition(".")
        if kind == "magnitude":
            factors[name] = (1 + factors[name]) * np.linalg.norm(weights[f"{module}.weight"], axis=1)
    return weights, factors


def normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return (rng.standard_normal(shape) * deviation).astype(np.float32)


@st.composite
def cases(draw: st.DrawFn, dropout: float = 0.0) -> Drawn:
    """A model with an adapter, and a batch for it."""
    model = draw(model_configs())
    lora = replace(draw(lora_configs(model)), dropout=dropout)
    seed = draw(SEEDS)
    weights, factors = make_arrays(model, lora, seed)
    return Drawn("random", model, lora, weights, factors, drawn_batch=draw(batches(model)), seed=seed)


@st.composite
def windows(draw: st.DrawFn, model: ModelConfig, num_windows: int) -> list[list[Batch]]:
    """The micro-batches of each update, of any number and shape; one of them may have no target."""
    drawn = [draw(st.lists(batches(model), min_size=1, max_size=3)) for _ in range(num_windows)]
    for window in drawn:
        if len(window) > 1 and draw(st.booleans()):
            window[0] = window[0]._replace(mask_BT=np.zeros_like(window[0].mask_BT))
    return drawn


@st.composite
def train_configs(draw: st.DrawFn, iters: int, optimizers: Sequence[str] = ("adamw", "sgd")) -> TrainConfig:
    """`iters` must be a power of two, so that float32 holds every learning rate exactly."""
    schedule = draw(st.sampled_from(["constant", "linear"]))
    return TrainConfig(
        iters=iters,
        learning_rate=draw(st.sampled_from(DYADIC_RATES)),
        lr_schedule=schedule,
        warmup_steps=draw(st.sampled_from([0, iters // 2])),
        loraplus_lr_ratio=draw(st.sampled_from([1.0, 4.0])),
        optimizer=draw(st.sampled_from(optimizers)),
        weight_decay=draw(st.sampled_from([0.0, 0.125])),
        max_grad_norm=draw(st.sampled_from([0.0, 0.25, 64.0])),
        seed=draw(st.integers(0, 1000)),
    )
