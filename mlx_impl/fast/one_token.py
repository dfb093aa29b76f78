"""The next token of each row through the decoder: `reading.read` for one token, in half the steps.

A token of a small model is bound by the host, which builds a graph and queues it, node by node. So modules
are looked up once an answer; a token is a row of a matrix (B, I), which no product has to reshape; weights
are transposed and factors cast and scaled once; and all layers share one array that holds the position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import model as plain
from ..lora import LoRALinear, lora_layers
from ..model import Block, CausalLM, RMSNorm
from . import ops
from .kv_cache import KVCache, room_for
from .packed import is_unpacked_for, packed_of
from .reading import Gap

Function = Callable[[mx.array], mx.array]  # of x_BI


class Layer(NamedTuple):
    """The functions of one block."""

    input_norm: Function
    qkv: tuple[Function, Function, Function]
    qk_norm: tuple[Function, Function] | None
    wavelength_P: mx.array
    o: Function
    norm: Function
    gate: Function
    up: Function
    down: Function


class OneToken:
    """The model as it is now, in evaluation; later factors are not seen (`is_current`)."""

    def __init__(self, model: CausalLM, rows: int) -> None:
        decoder = model.model
        self.embed, self.window, self.rows = decoder.embed_tokens, decoder.window, rows
        self.layers = [layer_of(block, rows) for block in decoder.layers]
        self.norm, self.gated = norm_of(decoder.norm), ops.gated_here()
        self.head = model.head if model.config.tie_word_embeddings else product_of(model.lm_head, rows)
        if type(self.embed) is nn.Embedding and model.config.tie_word_embeddings:
            self.head = product_with(self.embed.weight)
        self.positions_N = mx.arange(0)
        self.factors = [(linear, linear.lora_a) for linear in lora_layers(model).values()]

    def is_current(self) -> bool:
        """Whether the model has the factors that it had then."""
        return all(linear["lora_a"] is lora_a for linear, lora_a in self.factors)

    def logits_BV(self, token_B: mx.array, caches: Sequence[KVCache], gap: Gap | None = None) -> mx.array:
        """The logits after one more token of each row has been read into the caches."""
        offset, rows = caches[0].num_tokens, self.rows
        position, mask_B1TS = self.position(offset, gap), self.mask_B1TS(offset, gap)
        x_BD = self.embed(token_B)
        for layer, cache in zip(self.layers, caches, strict=True):
            normed_BD = layer.input_norm(x_BD)
            K = 2 * layer.wavelength_P.size
            q_BH1K, k_BG1K, v_BG1K = (f(normed_BD).reshape(rows, -1, 1, K) for f in layer.qkv)
            if layer.qk_norm is not None:
                q_BH1K, k_BG1K = layer.qk_norm[0](q_BH1K), layer.qk_norm[1](k_BG1K)
            q_BH1K = ops.rotated(q_BH1K, layer.wavelength_P, position)
            keys = cache.extend(ops.rotated(k_BG1K, layer.wavelength_P, position), v_BG1K)
            x_BD = x_BD + layer.o(ops.attention_of_any(q_BH1K, *keys, mask_B1TS).reshape(rows, -1))
            normed_BD = layer.norm(x_BD)
            x_BD = x_BD + layer.down(self.gated(layer.gate(normed_BD), layer.up(normed_BD)))
        return self.head(self.norm(x_BD))

    def position(self, offset: int, gap: Gap | None) -> mx.array:
        """Of each row, or one of all (`ops.rotated`); a GPU reads its own memory faster than a host's."""
        if gap is not None:
            return gap.positions_B(offset)
        if offset >= self.positions_N.size:
            self.positions_N = mx.arange(room_for(offset + 1))
        return self.positions_N[offset]

    def mask_B1TS(self, offset: int, gap: Gap | None) -> mx.array | None:
        if gap is None:
            return plain.attention_mask(1, offset, self.window, None)
        return gap.mask_B1TS(1, offset, self.window)


def layer_of(block: Block, rows: int) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    q, k, v, o, gate, up, down = (
        product_of(linear, rows)
        for linear in (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
    )
    qk_norm = (norm_of(attention.q_norm), norm_of(attention.k_norm)) if attention.qk_norm else None
    wavelength_P = ops.wavelengths(attention.frequency_P)
    norms = norm_of(block.input_layernorm), norm_of(block.post_attention_layernorm)
    return Layer(norms[0], (q, k, v), qk_norm, wavelength_P, o, norms[1], gate, up, down)


def norm_of(norm: RMSNorm) -> Function:
    weight_D, eps = norm.weight, norm.eps
    return lambda x_BD: ops.rms_norm(x_BD, weight_D, eps)


def product_of(linear: nn.Module, rows: int) -> Function:
    """linear(x) for x of so many rows; of a kind that is not known here, the linear itself."""
    if type(linear) is LoRALinear:
        return LowRankProduct(linear, rows)
    if type(linear) is nn.Linear:
        return product_with(linear.weight, linear.get("bias"))
    packed = packed_of(linear)
    if packed is None or "bias" in linear or is_unpacked_for(rows):
        return linear
    words, scales, biases, group_size, bits = packed
    return lambda x_BI: mx.quantized_matmul(x_BI, words, scales, biases, True, group_size, bits)


def product_with(weight_OI: mx.array, bias_O: mx.array | None = None) -> Function:
    weight_IO = weight_OI.T
    if bias_O is None:
        return lambda x_BI: x_BI @ weight_IO
    return lambda x_BI: mx.addmm(bias_O, x_BI, weight_IO)


class LowRankProduct:
    """y = x W^T + x (scale A) B, the factors in the type of x; both in memory as their transposes.

    MLX has a fast product of one row on CUDA with such a matrix, but none that adds; cuBLAS adds.
    """

    def __init__(self, linear: LoRALinear, rows: int) -> None:
        self.base, self.linear, self.rows = product_of(linear.linear, rows), linear, rows
        self.cast_factors(linear.lora_a.dtype)

    def __call__(self, x_BI: mx.array) -> mx.array:
        if x_BI.dtype != self.dtype:
            self.cast_factors(x_BI.dtype)
        y_BO, h_BR = self.base(x_BI), x_BI @ self.a_IR
        return y_BO + h_BR @ self.b_RO if self.rows == 1 else mx.addmm(y_BO, h_BR, self.b_RO)

    def cast_factors(self, dtype: mx.Dtype) -> None:
        a_IR, b_RO = self.linear.scale * self.linear.lora_a, self.linear.lora_b
        self.a_IR, self.b_RO = (mx.contiguous(factor.T.astype(dtype)).T for factor in (a_IR, b_RO))
        self.dtype = dtype
