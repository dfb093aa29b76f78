"""Known bugs of attention: rotary positions, the causal mask and its window, grouped heads, their norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlx_impl.config import ModelConfig
from reference import model, ops
from reference.model import Attention, attention_mask, rope_frequencies
from tests.lora_ladder.signatures import Hypothesis, Signature, patched

attention, rope = ops.attention, ops.rope
BASES = (1e4, 5e5, 1e6)  # of Llama 2, Llama 3 and Qwen 2


def op(**members: Any) -> Hypothesis:
    return patched((ops, members))


def interleaved(x_BHTK: Tensor, frequency_P: Tensor, position_BT: Tensor) -> Tensor:
    """Pairs (x[2k], x[2k + 1])."""
    angle = position_BT.to(x_BHTK.dtype)[:, None, :, None] * frequency_P.to(x_BHTK.dtype)
    even, odd = x_BHTK[..., ::2], x_BHTK[..., 1::2]
    rotated = [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()]
    return torch.stack(rotated, dim=-1).flatten(-2)


def frequencies(**settings: Any) -> Hypothesis:
    return patched(
        (model, {"rope_frequencies": lambda config: rope_frequencies(replace(config, **settings))})
    )


def scaled_frequencies(**settings: Any) -> Hypothesis:
    """With other numbers in a llama3 scaling, where there is one."""

    def broken(config: ModelConfig) -> Tensor:
        scaling = config.rope_scaling
        if scaling is None or scaling.rope_type != "llama3":
            return rope_frequencies(config)
        return rope_frequencies(replace(config, rope_scaling=replace(scaling, **settings)))

    return patched((model, {"rope_frequencies": broken}))


def without_blend(config: ModelConfig) -> Tensor:
    """Each frequency is kept or divided, whichever is nearer."""
    kept, blended = rope_frequencies(replace(config, rope_scaling=None)), rope_frequencies(config)
    if config.rope_scaling is None:
        return kept
    divided = kept / config.rope_scaling.factor
    return torch.where(blended > (kept + divided) / 2, kept, divided)


def scores(factor: Callable[[Tensor, Tensor], float]) -> Hypothesis:
    """The scores times a number, from queries and keys."""
    return op(attention=lambda q, k, v, mask: attention(q * factor(q, k), k, v, mask))


def mask_of(change: Callable[[int, int | None, Tensor | None], Tensor]) -> Hypothesis:
    return patched((model, {"attention_mask": change}))


def everything(T: int, window: int | None, segment_BT: Tensor | None) -> Tensor:
    return torch.ones(1, 1, T, T, dtype=torch.bool)


def one_ahead(T: int, window: int | None, segment_BT: Tensor | None) -> Tensor:
    return attention_mask(T, window, segment_BT) | torch.ones(T, T, dtype=torch.bool).tril(1).triu(1)


def not_itself(T: int, window: int | None, segment_BT: Tensor | None) -> Tensor:
    """The first token still sees itself, or it would see nothing."""
    mask = attention_mask(T, window, segment_BT) & ~torch.eye(T, dtype=torch.bool)
    return mask | (torch.arange(T) == 0)[:, None] & torch.eye(T, dtype=torch.bool)


def windows(change: Callable[[int], int | None]) -> Hypothesis:
    return mask_of(
        lambda T, window, segment_BT: attention_mask(
            T, None if window is None else change(window), segment_BT
        )
    )


def heads(choose: Callable[[Tensor, int], Tensor]) -> Hypothesis:
    """Keys and values of each query head, from those of the kv heads and the number of query heads."""
    return op(
        attention=lambda q, k, v, mask: attention(q, choose(k, q.shape[1]), choose(v, q.shape[1]), mask)
    )


def tiled(x_BGTK: Tensor, H: int) -> Tensor:
    return x_BGTK.repeat(1, H // x_BGTK.shape[1], 1, 1)


def first_head(x_BGTK: Tensor, H: int) -> Tensor:
    return x_BGTK[:, :1].expand(-1, H, -1, -1)


def attend(self: Any, x_BTD: Tensor, position_BT: Tensor, mask: Tensor, order: str = "") -> Tensor:
    """The attention of the reference, with its norms of queries and keys after rope, or left out."""
    q, k, v = (
        one(x_BTD).unflatten(-1, (-1, self.head_dim)).swapaxes(1, 2)
        for one in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = (ops.rope(x, self.frequency_P, position_BT) for x in (q, k))
    if self.qk_norm and order == "after":
        q, k = self.q_norm(q), self.k_norm(k)
    return self.o_proj(ops.attention(q, k, v, mask).swapaxes(1, 2).flatten(2))


def qk_norm(order: str) -> Hypothesis:
    return patched((Attention, {"forward": lambda self, x, at, mask: attend(self, x, at, mask, order)}))


def known(name: str, sentence: str, hypothesis: Hypothesis, link: str = "", rung: int = 4) -> Signature:
    return Signature(name, rung, sentence, hypothesis, link)


SIGNATURES = [
    known(
        "rope interleaved",
        "RoPE rotates pairs (x[2k], x[2k + 1]); the checkpoint pairs x[k] with x[k + K/2]",
        op(rope=interleaved),
        "mx.fast.rope(traditional=True)",
    ),
    known("rope left out", "queries and keys are not rotated", op(rope=lambda x, *_: x)),
    known(
        "rope backwards",
        "RoPE rotates by minus the angle",
        op(rope=lambda x, frequency, position: rope(x, -frequency, position)),
    ),
    *(
        known(
            f"rope base {base:g}",
            f"RoPE's base is {base:g}, whatever the configuration says",
            frequencies(rope_theta=base),
            "torchtune#997",
        )
        for base in BASES
    ),
    known("rope scaling ignored", "rope_scaling is ignored", frequencies(rope_scaling=None)),
    known(
        "llama3 without blend",
        "llama3's rope scaling keeps or divides a frequency and blends none",
        patched((model, {"rope_frequencies": without_blend})),
    ),
    known(
        "llama3 factor fixed",
        "llama3's rope scaling divides by 8, whatever factor says",
        scaled_frequencies(factor=8.0),
    ),
    known(
        "llama3 bands fixed",
        "llama3's rope scaling takes 1 and 4 for low_freq_factor and high_freq_factor",
        scaled_frequencies(low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    known("no causal mask", "there is no causal mask: each token sees the later ones", mask_of(everything)),
    known(
        "causal mask one ahead",
        "the causal mask is off by one: each token sees the next one",
        mask_of(one_ahead),
    ),
    known(
        "causal mask without the token itself",
        "the causal mask is off by one: a token does not see itself",
        mask_of(not_itself),
    ),
    known(
        "attention unscaled",
        "attention scores are not divided by sqrt(K)",
        scores(lambda q, k: q.shape[-1] ** 0.5),
    ),
    known(
        "attention divided by K",
        "attention scores are divided by K, not by sqrt(K)",
        scores(lambda q, k: q.shape[-1] ** -0.5),
    ),
    known(
        "kv heads tiled",
        "grouped heads in the wrong order: kv heads 0 1 0 1 are repeated as tiles, not 0 0 1 1",
        heads(tiled),
    ),
    known("first kv head for all", "every query head uses the first kv head", heads(first_head)),
    known("window ignored", "sliding_window is ignored", windows(lambda window: None)),
    known(
        "window one too wide",
        "the sliding window is one token too wide: it does not count the token itself",
        windows(lambda window: window + 1),
    ),
    known(
        "window one too narrow",
        "the sliding window is one token too narrow",
        windows(lambda window: window - 1),
    ),
    known("qk norm after rope", "queries and keys are normed after RoPE, not before", qk_norm("after")),
    known("qk norm ignored", "qk_norm is ignored", qk_norm("")),
]
