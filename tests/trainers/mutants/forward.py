"""Rung 4: every layer is right, but the model is not the checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_impl import ops
from mlx_impl.config import ModelConfig
from mlx_impl.model import CausalLM, Decoder, attention_mask, rope_frequencies
from tests.trainers.mutants.mutant import PLAIN, Mutant, Patches

head, decode = CausalLM.head, Decoder.__call__


def frequencies(**settings: Any) -> Patches:
    return {"mlx_impl.model.rope_frequencies": lambda config: rope_frequencies(replace(config, **settings))}


def without_blend(config: ModelConfig) -> tuple[float, ...]:
    """Each frequency is either kept or scaled, whichever is nearer to the blend."""
    plain, stretched = rope_frequencies(replace(config, rope_scaling=None)), rope_frequencies(config)
    factor = config.rope_scaling.factor if config.rope_scaling else 1.0
    return tuple(
        p if s > p * (1 + 1 / factor) / 2 else p / factor for p, s in zip(plain, stretched, strict=True)
    )


def norm_after_rope(self: Any, x_BTD: mx.array, position: Any, mask: Any, *_: Any) -> mx.array:
    outputs = (projection(x_BTD) for projection in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = (mx.unflatten(y, -1, (-1, self.head_dim)).swapaxes(1, 2) for y in outputs)
    q, k = (ops.rope(x, self.frequency_P, position) for x in (q, k))
    if self.qk_norm:
        q, k = self.q_norm(q), self.k_norm(k)
    return self.o_proj(ops.attention(q, k, v, mask).swapaxes(1, 2).flatten(2))


def head_of_its_own(self: Any, x_BTD: mx.array) -> mx.array:
    if not self.config.tie_word_embeddings:
        return head(self, x_BTD)
    return x_BTD @ mx.random.normal(self.model.embed_tokens.weight.shape, scale=0.3, key=mx.random.key(0)).T


def normed_residual(self: Any, x_BTD: mx.array, *more: Any) -> mx.array:
    normed_BTD = self.input_layernorm(x_BTD)
    x_BTD = normed_BTD + self.self_attn(normed_BTD, *more)
    return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


def swapped_gate(self: Any, x_BTD: mx.array) -> mx.array:
    return self.down_proj(ops.silu(self.up_proj(x_BTD)) * self.gate_proj(x_BTD))


def scaled_embedding(self: Any, tokens_BT: mx.array) -> mx.array:
    return self.weight[tokens_BT] * self.weight.shape[1] ** 0.5


def seeing_the_row_before(self: Any, *tokens: Any, **more: Any) -> mx.array:
    x_BTD = decode(self, *tokens, **more)
    return x_BTD + 2.0**-10 * mx.concatenate([0 * x_BTD[:1], x_BTD[:-1]])


def windows(change: int | None) -> Patches:
    """Makes every attention window wider by `change`; None: removes it."""

    def broken(T: int, offset: int, window: int | None, segment_BT: mx.array | None) -> Any:
        given = None if window is None or change is None else window + change
        return attention_mask(T, offset, given, segment_BT)

    return {"mlx_impl.model.attention_mask": broken}


MUTANTS = [
    Mutant(
        "rope-scaling-ignored",
        4,
        "The configuration scales RoPE for long contexts, but the loader does not know the field.",
        frequencies(rope_scaling=None),
        cases=("linear rope", "llama3 rope"),
    ),
    Mutant(
        "rope-scaling-without-blend",
        4,
        "Llama 3's RoPE scaling keeps or scales each frequency, without blending those in between.",
        {"mlx_impl.model.rope_frequencies": without_blend},
        cases=("llama3 rope",),
    ),
    Mutant(
        "rope-base-fixed",
        4,
        "RoPE's base is always 10,000, whatever the configuration says.",
        frequencies(rope_theta=10000.0),
        "torchtune#997",
    ),
    Mutant(
        "qk-norm-after-rope",
        4,
        "Queries and keys are normed after RoPE instead of before, so the norm's weights scale other values.",
        {"mlx_impl.model.Attention.__call__": norm_after_rope},
        cases=("qk norm",),
        trainer=PLAIN,
    ),
    Mutant(
        "qkv-bias-lost",
        4,
        "The biases of queries, keys and values are loaded but never added.",
        {"mlx.nn.Linear.__call__": lambda self, x: x @ self.weight.T},
        cases=("qkv bias",),
        trainer=PLAIN,
    ),
    Mutant(
        "tied-head-not-tied",
        4,
        "The checkpoint has no head, because the embedding is the head; the model keeps a random head.",
        {"mlx_impl.model.CausalLM.head": head_of_its_own},
        cases=("tied",),
    ),
    Mutant(
        "sliding-window-ignored",
        4,
        "The configuration has a sliding window, but every token attends to its whole past.",
        windows(None),
        cases=("sliding window",),
        trainer=PLAIN,
    ),
    Mutant(
        "sliding-window-one-too-wide",
        4,
        "The sliding window does not count the token itself, so it is one token too wide.",
        windows(1),
        cases=("sliding window",),
        trainer=PLAIN,
    ),
    Mutant(
        "residual-after-the-norm",
        4,
        "The residual branch takes the normed input instead of the input.",
        {"mlx_impl.model.Block.__call__": normed_residual},
        trainer=PLAIN,
    ),
    Mutant(
        "gate-and-up-swapped",
        4,
        "The gate and up projections of the feed-forward are swapped: same shapes, another function.",
        {"mlx_impl.model.FeedForward.__call__": swapped_gate},
        trainer=PLAIN,
    ),
    Mutant(
        "embedding-scaled",
        4,
        "The embedding is multiplied by the square root of the width, as another model family does.",
        {"mlx.nn.Embedding.__call__": scaled_embedding},
    ),
    Mutant(
        "rows-leak",
        4,
        "A little of each row leaks into the next row, as when packed documents are not separated.",
        {"mlx_impl.model.Decoder.__call__": seeing_the_row_before},
        "trl#805",
        trainer=PLAIN,
    ),
]
