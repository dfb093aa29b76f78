"""The Llama decoder: embedding, blocks of attention and gated feed-forward, norm, head.

Sources: [1] Touvron et al. 2023, "LLaMA", section 2.2; [2] Zhang and Sennrich 2019, "RMSNorm", eq. 4;
[3] Su et al. 2021, "RoFormer", eq. 34, in Hugging Face's half-split order; [4] Ainslie et al. 2023, "GQA";
[5] Llama 3.1's `apply_scaling`, for long contexts.
Differs from reference/model.py: `__call__` for `forward`; a key/value cache in attention; one number for the
positions and no mask where neither a window nor packing needs more, so that MLX's kernels can be used; which
adapter the model carries is kept in `lora`. Weights load by `nn.Module.load_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .config import LoRAConfig, ModelConfig
from .recompute import recomputed


def rope_frequencies(config: ModelConfig) -> tuple[float, ...]:
    """theta**(-k/K) for k = 0, 2, ..., K - 2, one for each pair, scaled for long contexts [5]."""
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
        kept = min(max((turns - low) / (high - low), 0), 1)  # share of the original frequency that is kept
        stretched.append(kept * frequency + (1 - kept) * frequency / scaling.factor)
    return tuple(stretched)


def attention_mask(T: int, offset: int, window: int | None, segment_BT: mx.array | None) -> mx.array | None:
    """mask_B1TS: whether query t, after `offset` cached tokens, attends key s. None: causal, all of the past.

    The attention window is the last `window` tokens, the query's own included (Mistral's sliding window). In
    packed rows a query attends its own example only (block-diagonal attention); they cannot be used with a
    cache.
    """
    S = offset + T
    if segment_BT is None and (window is None or window >= S):
        return None
    query_T1, key_S = mx.arange(offset, S)[:, None], mx.arange(S)
    mask_TS = key_S <= query_T1
    if window is not None:
        mask_TS = mask_TS & (query_T1 - key_S < window)
    if segment_BT is None:
        return mask_TS[None, None]
    return (mask_TS & (segment_BT[:, :, None] == segment_BT[:, None, :]))[:, None]


def position_ids(segment_BT: mx.array) -> mx.array:
    """position_BT of packed rows: counted from 0 in each example."""
    time_T = mx.arange(segment_BT.shape[1])
    is_same_BT = segment_BT[:, 1:] == segment_BT[:, :-1]
    start_BT = mx.pad(mx.where(is_same_BT, 0, time_T[1:]), [(0, 0), (1, 0)])
    return time_T - mx.cummax(start_BT, axis=1)


class Cache(Protocol):
    """The keys and values of one attention layer for the tokens before these."""

    @property
    def num_tokens(self) -> int: ...

    def extend(self, k_BGTK: mx.array, v_BGTK: mx.array) -> tuple[mx.array, mx.array]: ...


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

    def __call__(
        self,
        x_BTD: mx.array,
        position: int | mx.array,
        mask_B1TS: mx.array | None,
        cache: Cache | None = None,
    ) -> mx.array:
        q_BHTK, k_BGTK, v_BGTK = (
            mx.unflatten(linear(x_BTD), -1, (-1, self.head_dim)).swapaxes(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q_BHTK, k_BGTK = self.q_norm(q_BHTK), self.k_norm(k_BGTK)
        q_BHTK, k_BGTK = (ops.rope(x, self.frequency_P, position) for x in (q_BHTK, k_BGTK))
        k_BGSK, v_BGSK = (k_BGTK, v_BGTK) if cache is None else cache.extend(k_BGTK, v_BGTK)
        mix_BHTK = ops.attention(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)
        return self.o_proj(mix_BHTK.swapaxes(1, 2).flatten(2))


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        return self.down_proj(ops.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        x_BTD: mx.array,
        position: int | mx.array,
        mask_B1TS: mx.array | None,
        cache: Cache | None = None,
    ) -> mx.array:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), position, mask_B1TS, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Token ids to the final hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.window = config.sliding_window
        self.grad_checkpoint = False  # in training, recompute each block's activations in the backward pass

    def __call__(
        self,
        tokens_BT: mx.array,
        segment_BT: mx.array | None = None,  # in packed rows: which example each token belongs to
        caches: Sequence[Cache] = (),
    ) -> mx.array:
        offset = caches[0].num_tokens if caches else 0
        position = offset if segment_BT is None else position_ids(segment_BT)
        mask_B1TS = attention_mask(tokens_BT.shape[1], offset, self.window, segment_BT)
        x_BTD = self.embed_tokens(tokens_BT)
        for number, layer in enumerate(self.layers):
            if self.grad_checkpoint and self.training:
                x_BTD = recomputed(layer, x_BTD, position, mask_B1TS)
            else:
                x_BTD = layer(x_BTD, position, mask_B1TS, caches[number] if caches else None)
        return self.norm(x_BTD)


class CausalLM(nn.Module):
    """Token ids to next-token logits."""

    lora: LoRAConfig  # set by `lora.add_lora`

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens_BT: mx.array, segment_BT: mx.array | None = None) -> mx.array:
        return self.head(self.model(tokens_BT, segment_BT))

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
