"""Rung 3: sound layers in a model that is not the checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_impl.fast.view import View, view_of

from mlx_impl import ops
from mlx_impl.config import ModelConfig
from mlx_impl.model import CausalLM, Decoder, rope_frequencies
from tests.trainers.twins.twin import Patches, Twin

head, decode = CausalLM.head, Decoder.__call__


def frequencies(**settings: Any) -> Patches:
    return {"mlx_impl.model.rope_frequencies": lambda config: rope_frequencies(replace(config, **settings))}


def without_blend(config: ModelConfig) -> tuple[float, ...]:
    """Each pair is kept or stretched, whichever is nearer."""
    plain, stretched = rope_frequencies(replace(config, rope_scaling=None)), rope_frequencies(config)
    factor = config.rope_scaling.factor if config.rope_scaling else 1.0
    return tuple(
        p if s > p * (1 + 1 / factor) / 2 else p / factor for p, s in zip(plain, stretched, strict=True)
    )


def norm_after_rope(self: Any, x_BTD: mx.array, view: View, *_: Any) -> mx.array:
    outputs = (projection(x_BTD) for projection in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = (view.split_heads(y, y.shape[-1] // self.head_dim) for y in outputs)
    q, k = ops.rope(q, self.frequency_P), ops.rope(k, self.frequency_P)
    if self.qk_norm:
        q, k = self.q_norm(q), self.k_norm(k)
    return self.o_proj(view.wanted(view.merge_heads(ops.attention(q, k, v))))


def head_of_its_own(self: Any, x_BTD: mx.array) -> mx.array:
    if not self.config.tie_word_embeddings:
        return head(self, x_BTD)
    return x_BTD @ mx.random.normal(self.model.embed_tokens.weight.shape, scale=0.3, key=mx.random.key(0)).T


def normed_residual(self: Any, x_BTD: mx.array, view: View, *cache: Any) -> mx.array:
    normed_BTD = self.input_layernorm(x_BTD)
    x_BTD = view.wanted(normed_BTD) + self.self_attn(normed_BTD, view, *cache)
    return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


def swapped_gate(self: Any, x_BTD: mx.array) -> mx.array:
    return self.down_proj(ops.silu(self.up_proj(x_BTD)) * self.gate_proj(x_BTD))


def scaled_embedding(self: Any, tokens_BT: mx.array) -> mx.array:
    return self.weight[tokens_BT] * self.weight.shape[1] ** 0.5


def seeing_the_row_before(self: Any, tokens_BT: mx.array, *more: Any) -> mx.array:
    x_BTD = decode(self, tokens_BT, *more)
    return x_BTD + 2.0**-10 * mx.concatenate([0 * x_BTD[:1], x_BTD[:-1]])


def windows(change: int | None) -> Patches:
    """Every window that much wider; None: none at all."""

    def broken(T: int, offset: int, window: int | None, segment_BT: mx.array | None) -> Any:
        given = None if window is None or change is None else window + change
        return view_of(T, offset, given, segment_BT)

    return {"mlx_impl.model.view_of": broken}


TWINS = [
    Twin(
        "rope-scaling-ignored",
        3,
        "The configuration stretches rope for long contexts; the loader does not know the field.",
        frequencies(rope_scaling=None),
        cases=("linear rope", "llama3 rope"),
    ),
    Twin(
        "rope-scaling-without-blend",
        3,
        "Llama 3's rule keeps or stretches each frequency, and forgets the blend between.",
        {"mlx_impl.model.rope_frequencies": without_blend},
        cases=("llama3 rope",),
    ),
    Twin(
        "rope-base-fixed",
        3,
        "Rope's base is 10,000, whatever the configuration says.",
        frequencies(rope_theta=10000.0),
        "torchtune#997",
    ),
    Twin(
        "qk-norm-after-rope",
        3,
        "Queries and keys are normed after they are turned; the norm's weights then scale other elements.",
        {"mlx_impl.model.Attention.__call__": norm_after_rope},
        cases=("qk norm",),
    ),
    Twin(
        "qkv-bias-lost",
        3,
        "The biases of queries, keys and values are loaded and never added.",
        {
            "mlx.nn.Linear.__call__": lambda self, x: x @ self.weight.T,
            "mlx_impl.fast.projection.low_rank_of": lambda linear: None,
        },
        cases=("qkv bias",),
    ),
    Twin(
        "tied-head-not-tied",
        3,
        "The checkpoint has no head because it is the embedding; the model keeps a random one.",
        {"mlx_impl.model.CausalLM.head": head_of_its_own},
        cases=("tied",),
    ),
    Twin(
        "sliding-window-ignored",
        3,
        "The configuration has a sliding window; every token sees its whole past.",
        windows(None),
        cases=("sliding window",),
    ),
    Twin(
        "sliding-window-one-too-wide",
        3,
        "A token sees as many before it as the window is wide, and itself.",
        windows(1),
        cases=("sliding window",),
    ),
    Twin(
        "residual-after-the-norm",
        3,
        "The residual branch takes the normed input instead of the input.",
        {"mlx_impl.model.Block.__call__": normed_residual},
    ),
    Twin(
        "gate-and-up-swapped",
        3,
        "The feed-forward's two projections change places: same shapes, another function.",
        {"mlx_impl.model.FeedForward.__call__": swapped_gate},
    ),
    Twin(
        "embedding-scaled",
        3,
        "The embedding is multiplied by the root of the width, as another family of models does.",
        {"mlx.nn.Embedding.__call__": scaled_embedding},
    ),
    Twin(
        "rows-leak",
        3,
        "A trace of the row before reaches each row of the batch, as when packed documents are not parted.",
        {"mlx_impl.model.Decoder.__call__": seeing_the_row_before},
        "trl#805",
    ),
]
