"""The decoder's forward pass with a key/value cache, over the modules of `model.py`, for generation.

The tables of RoPE are made once, a token alone attends without a mask, and rows of unequal length have a gap:
places that no later token attends, before the row's own tokens, so that all rows end together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from .. import model as plain
from ..model import Block, CausalLM
from . import ops
from .kv_cache import KVCache

PROMPT_POSITIONS = 512  # read at once on a CPU, where attention holds a score for each of them and each key
PROMPT_POSITIONS_ON_A_GPU = 16384


class Gap(NamedTuple):
    """Row b has gap_B[b] places without a token, after the `start` tokens that all rows share."""

    start: int
    gap_B: mx.array

    def positions_B(self, offset: int) -> mx.array:
        """The position of the token at place `offset` of each row."""
        return offset - self.gap_B

    def mask_B1TS(self, T: int, offset: int, window: int | None) -> mx.array:
        """`attention_mask` of T places after `offset`; each sees itself, so that one in a gap is finite."""
        key_S, query_T1 = mx.arange(offset + T), mx.arange(offset, offset + T)[:, None]
        gap_B1 = self.gap_B[:, None]
        is_token_BS = (key_S < self.start) | (key_S >= self.start + gap_B1)
        mask_BTS = (key_S <= query_T1) & is_token_BS[:, None]
        if window is not None:
            position_BS = mx.where(key_S < self.start, key_S, key_S - gap_B1)
            mask_BTS = mask_BTS & (position_BS[:, offset:, None] - position_BS[:, None] < window)
        return (mask_BTS | (key_S == query_T1))[:, None]


def part_width(rows: int) -> int:
    """How many tokens of each row are read at once."""
    return max(1, (PROMPT_POSITIONS_ON_A_GPU if ops.on_gpu() else PROMPT_POSITIONS) // rows)


def read_prompt(
    model: CausalLM, tokens_BT: mx.array, caches: Sequence[KVCache], gap: Gap | None = None
) -> mx.array:
    """The last hidden state of each row, (B, D); long prompts a part after the other, to need less memory."""
    rows, width = tokens_BT.shape
    step = part_width(rows)
    for start in range(0, width - step, step):
        read(model, tokens_BT[:, start : start + step], caches, gap)
        mx.eval([(cache.keys_BGCK, cache.values_BGCK) for cache in caches])
    return read(model, tokens_BT[:, (width - 1) // step * step :], caches, gap)


def read(model: CausalLM, tokens_BT: mx.array, caches: Sequence[KVCache], gap: Gap | None = None) -> mx.array:
    """The last hidden state of each row, (B, D), after these tokens have been read into the caches."""
    decoder, T, offset = model.model, tokens_BT.shape[1], caches[0].num_tokens
    position: int | mx.array = offset if gap is None else gap.positions_B(offset)
    if gap is None:
        mask_B1TS = plain.attention_mask(T, offset, decoder.window, None)
    else:
        mask_B1TS = gap.mask_B1TS(T, offset, decoder.window)
    x_BTD = decoder.embed_tokens(tokens_BT)
    for layer, cache in zip(decoder.layers, caches, strict=True):
        x_BTD = block(layer, x_BTD, position, mask_B1TS, cache)
    return decoder.norm(x_BTD[:, -1])


def block(
    layer: Block, x_BTD: mx.array, position: int | mx.array, mask_B1TS: mx.array | None, cache: KVCache
) -> mx.array:
    """`Block.__call__`."""
    attention, mlp, K = layer.self_attn, layer.mlp, layer.self_attn.head_dim
    normed_BTD = layer.input_layernorm(x_BTD)
    q_BHTK, k_BGTK, v_BGTK = (
        mx.unflatten(linear(normed_BTD), -1, (-1, K)).swapaxes(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if attention.qk_norm:
        q_BHTK, k_BGTK = attention.q_norm(q_BHTK), attention.k_norm(k_BGTK)
    wavelength_P = ops.wavelengths(attention.frequency_P)
    q_BHTK, k_BGTK = (ops.rotated(x, wavelength_P, position) for x in (q_BHTK, k_BGTK))
    k_BGSK, v_BGSK = cache.extend(k_BGTK, v_BGTK)
    mix_BHTK = ops.attention_of_any(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)
    x_BTD = x_BTD + attention.o_proj(mix_BHTK.swapaxes(1, 2).flatten(2))
    normed_BTD = layer.post_attention_layernorm(x_BTD)
    return x_BTD + mlp.down_proj(ops.gated_once(mlp.gate_proj(normed_BTD), mlp.up_proj(normed_BTD)))
