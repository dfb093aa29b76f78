"""The Llama decoder: embedding, blocks of attention and gated feed-forward, norm, head.

Sources: [1] Touvron et al. 2023, "LLaMA", section 2.2; [2] Zhang and Sennrich 2019, "RMSNorm", eq. 4;
[3] Su et al. 2021, "RoFormer", eq. 34, in Hugging Face's half-split order; [4] Ainslie et al. 2023, "GQA";
[5] Llama 3.1's `apply_scaling`, for long contexts.
Differs from reference/model.py: `__call__` for `forward`, primitives from `ops`, a key/value cache, rows that
hold several examples (`view.py`), slots that are left out (`slots.py`: then x_BTD is one row of what is
left, but in attention), blocks that may be recomputed in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .config import ModelConfig
from .fast.projection import project, project_gated
from .fast.recompute import recomputed
from .fast.slots import Slots
from .fast.view import View, view_of


def rope_frequencies(config: ModelConfig) -> tuple[float, ...]:
    """theta**(-2k/K) for each of the K / 2 pairs, stretched where the configuration says so [5]."""
    K, scaling = config.head_dim, config.rope_scaling
    frequencies = [config.rope_theta ** (-k / K) for k in range(0, K, 2)]
    if scaling is None:
        return tuple(frequencies)
    if scaling.rope_type == "linear":
        return tuple(frequency / scaling.factor for frequency in frequencies)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stretched = []
    for frequency in frequencies:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0), 1)  # the share that is left unstretched
        stretched.append(kept * frequency + (1 - kept) * frequency / scaling.factor)
    return tuple(stretched)


class KeyValueCache:
    """The keys and values of one attention layer for the tokens seen so far."""

    def __init__(self) -> None:
        self.k_BGSK: mx.array | None = None
        self.v_BGSK: mx.array | None = None

    @property
    def num_seen(self) -> int:
        return 0 if self.k_BGSK is None else int(self.k_BGSK.shape[2])

    def extend(self, k_BGTK: mx.array, v_BGTK: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values with the new ones; a row seen alone is shared by every new row."""
        if self.k_BGSK is not None and self.v_BGSK is not None:
            seen = (k_BGTK.shape[0], *self.k_BGSK.shape[1:])
            k_BGTK = mx.concatenate([mx.broadcast_to(self.k_BGSK, seen), k_BGTK], axis=2)
            v_BGTK = mx.concatenate([mx.broadcast_to(self.v_BGSK, seen), v_BGTK], axis=2)
        self.k_BGSK, self.v_BGSK = k_BGTK, v_BGTK
        return k_BGTK, v_BGTK


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x_BTD: mx.array) -> mx.array:
        return ops.rms_norm(x_BTD, self.weight, self.eps)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over the past; each key/value head serves H / G query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(K, config.rms_norm_eps), RMSNorm(K, config.rms_norm_eps)
        self.head_dim, self.qk_norm = K, config.qk_norm
        self.frequency_P = rope_frequencies(config)

    def __call__(self, x_BTD: mx.array, view: View, cache: KeyValueCache | None = None) -> mx.array:
        q_BHTK, k_BGSK, v_BGSK = (
            view.split_heads(y_BTO, y_BTO.shape[-1] // self.head_dim)
            for y_BTO in project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q_BHTK, k_BGSK = self.q_norm(q_BHTK), self.k_norm(k_BGSK)
        q_BHTK, k_BGSK = view.turn(q_BHTK, self.frequency_P), view.turn(k_BGSK, self.frequency_P)
        if cache:
            k_BGSK, v_BGSK = cache.extend(k_BGSK, v_BGSK)
        mix_BHTK = view.attend(q_BHTK, k_BGSK, v_BGSK)
        return project(view.wanted(view.merge_heads(mix_BHTK)), self.o_proj)[0]


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        gate_BTF, up_BTF = project(x_BTD, self.gate_proj, self.up_proj)
        return project_gated(gate_BTF, up_BTF, self.down_proj)


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x_BTD: mx.array, view: View, cache: KeyValueCache | None = None) -> mx.array:
        x_BTD = view.wanted(x_BTD) + self.self_attn(self.input_layernorm(x_BTD), view, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Token numbers to the last hidden state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.window = config.sliding_window
        self.grad_checkpoint = False  # in training, recompute each block instead of keeping it

    def __call__(
        self,
        tokens_BT: mx.array,
        caches: list[KeyValueCache] | None = None,
        segment_BT: mx.array | None = None,  # of packed rows: which example a token belongs to
    ) -> mx.array:
        view = view_of(tokens_BT.shape[1], caches[0].num_seen if caches else 0, self.window, segment_BT)
        return self.blocks(self.embed_tokens(tokens_BT), [view] * len(self.layers), caches)

    def at_targets(
        self,
        tokens_BT: mx.array,
        positions_N: mx.array,
        kept: Sequence[mx.array] | None = None,
        segment_BT: mx.array | None = None,
    ) -> mx.array:
        """(N, D): the last hidden states at these positions of the flattened (B, T), and little else.

        `kept` has the fields of `layout.KeptSlots`, which slots they see; without it all are computed.
        """
        view = view_of(tokens_BT.shape[1], 0, self.window, segment_BT)
        if kept:
            slots = Slots(*kept)
            view = replace(view, slots=slots)
            tokens_BT = tokens_BT.flatten()[slots.slot_S][None]
        last = replace(view, wanted_N=positions_N)
        views = [view] * (len(self.layers) - 1) + [last]
        return self.blocks(self.embed_tokens(tokens_BT), views).squeeze(0)  # a view, where [0] copies

    def blocks(
        self, x_BTD: mx.array, views: list[View], caches: list[KeyValueCache] | None = None
    ) -> mx.array:
        for number, (layer, view) in enumerate(zip(self.layers, views, strict=True)):
            if self.grad_checkpoint and self.training:
                x_BTD = recomputed(layer, x_BTD, view)
            else:
                x_BTD = layer(x_BTD, view, caches[number] if caches else None)
        return self.norm(x_BTD)


class CausalLM(nn.Module):
    """Token numbers to next-token logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        return self.head(self.model(tokens_BT))

    def head(self, x_BTD: mx.array) -> mx.array:
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(x_BTD)
        return self.lm_head(x_BTD)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the block dropout is off; after it the model is in training again if it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
