"""The Llama decoder: embedding, blocks of attention and gated feed-forward, norm, head.

Sources: [1] Touvron et al. 2023, "LLaMA", section 2.2; [2] Zhang and Sennrich 2019, "RMSNorm", eq. 4;
[3] Su et al. 2021, "RoFormer", eq. 34, in Hugging Face's half-split order; [4] Ainslie et al. 2023, "GQA";
[5] Llama 3.1's `apply_scaling`, for long contexts.
Differs from mlx_impl/model.py: `forward` for `__call__`; position ids and a mask always, where MLX takes one
number and "causal"; no key/value cache; `load_arrays`, because a PyTorch module takes tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from mlx_impl.config import ModelConfig
from reference import ops
from reference.recompute import recomputed


def rope_frequencies(config: ModelConfig) -> Tensor:
    """theta**(-2k/K) for each of the K / 2 pairs, stretched where the configuration says so, in float64."""
    k = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequency_P = config.rope_theta**-k
    scaling = config.rope_scaling
    if scaling is None:
        return frequency_P
    if scaling.rope_type == "linear":
        return frequency_P / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_P = scaling.original_max_position_embeddings * frequency_P / (2 * torch.pi)
    kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)  # share of the original frequency that is kept [5]
    return kept_P * frequency_P + (1 - kept_P) * frequency_P / scaling.factor


def attention_mask(T: int, window: int | None, segment_BT: Tensor | None) -> Tensor:
    """mask_B1TT: whether query t attends key s: itself and the past, within a window, of its own example."""
    mask_TT = torch.ones(T, T, dtype=torch.bool).tril()
    if window is not None:
        mask_TT = mask_TT.triu(1 - window)
    if segment_BT is None:
        return mask_TT[None, None]
    return (mask_TT & (segment_BT[:, :, None] == segment_BT[:, None, :]))[:, None]


def position_ids(segment_BT: Tensor) -> Tensor:
    """position_BT, counted from 0 in each example."""
    position_BT = torch.zeros_like(segment_BT)
    for t in range(1, segment_BT.shape[1]):
        is_same_B = segment_BT[:, t] == segment_BT[:, t - 1]
        position_BT[:, t] = torch.where(is_same_B, position_BT[:, t - 1] + 1, 0)
    return position_BT


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
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

    def forward(self, x_BTD: Tensor, position_BT: Tensor, mask_B1TT: Tensor) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = (
            linear(x_BTD).unflatten(-1, (-1, self.head_dim)).swapaxes(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q_BHTK, k_BGTK = self.q_norm(q_BHTK), self.k_norm(k_BGTK)
        q_BHTK, k_BGTK = (ops.rope(x, self.frequency_P, position_BT) for x in (q_BHTK, k_BGTK))
        mix_BHTK = ops.attention(q_BHTK, k_BGTK, v_BGTK, mask_B1TT)
        return self.o_proj(mix_BHTK.swapaxes(1, 2).flatten(2))


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(ops.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, position_BT: Tensor, mask_B1TT: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), position_BT, mask_B1TT)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Token ids to the final hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.window = config.sliding_window
        self.grad_checkpoint = False  # in training, recompute each block's activations in the backward pass

    def forward(self, tokens_BT: Tensor, segment_BT: Tensor | None = None) -> Tensor:
        T = tokens_BT.shape[1]
        position_BT = torch.arange(T)[None] if segment_BT is None else position_ids(segment_BT)
        mask_B1TT = attention_mask(T, self.window, segment_BT)
        x_BTD = self.embed_tokens(tokens_BT)
        for layer in self.layers:
            if self.grad_checkpoint and self.training:
                x_BTD = recomputed(layer, x_BTD, position_BT, mask_B1TT)
            else:
                x_BTD = layer(x_BTD, position_BT, mask_B1TT)
        return self.norm(x_BTD)


class CausalLM(nn.Module):
    """Token ids to next-token logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, segment_BT: Tensor | None = None) -> Tensor:
        return self.head(self.model(tokens_BT, segment_BT))

    def head(self, x_BTD: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            return x_BTD @ self.model.embed_tokens.weight.T
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


def load_arrays(module: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Copy NumPy arrays into the parameters of the same names; a missing or unknown name raises."""
    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
