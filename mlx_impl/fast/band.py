"""Attention with a sliding window, in chunks of a quarter of it: memory grows with T, not with T^2.

With a window of w tokens a query sees its own key and the w - 1 before it. Rows are cut into chunks of C
tokens; the queries of a chunk see keys of it and of the n chunks before, n C >= w - 1. The scores, of shape
(B T / C, H, C, (n + 1) C), are a band along the diagonal of T x T: of chunks as long as the window 2 w for
each query, of quarters 1.25 w. With a mask of T x T MLX's attention keeps T T scores for the gradient on a
CPU; on CUDA it makes the mask a number for each of them.
Source: Beltagy et al. 2020, "Longformer", section 3.1 and appendix A (chunks of a sliding window).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from . import ops

MIN_TOKENS = 512  # of a row: below, a mask of (T, T) is small
MIN_WINDOWS = 3  # in a row: with two, a band has as many scores as T x T
QUARTER, MIN_CHUNK = 4, 64  # shorter chunks are more products, each of few queries
MAX_SCORES = 2**27  # in the backward pass at once, on a GPU: 256 MiB in bfloat16


def pays(tokens: int, window: int) -> bool:
    return tokens >= max(MIN_TOKENS, MIN_WINDOWS * window)


def chunk_of(window: int) -> int:
    """Queries of a chunk."""
    return min(window, max(MIN_CHUNK, -(-window // QUARTER)))


def chunks_before(window: int) -> int:
    """How many chunks before its own a query may see."""
    return -(-(window - 1) // chunk_of(window))


def keys_of(window: int) -> int:
    """Keys that the queries of a chunk are multiplied with."""
    return (chunks_before(window) + 1) * chunk_of(window)


@dataclass(frozen=True)
class Band:
    """N chunks in each row, the last one filled up."""

    window: int
    mask_N1CS: mx.array

    def attend(self, q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array) -> mx.array:
        """`ops.attention` with `model.attention_mask` of this window; (B, H, T, K)."""
        masked = self.in_turn if ops.on_gpu() else self.at_once
        return masked(q_BHTK, k_BGTK, v_BGTK)

    def at_once(self, q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array) -> mx.array:
        """A CPU keeps the scores of the forward pass, all of them."""
        (B, H, T, K), C = q_BHTK.shape, chunk_of(self.window)
        mask = mx.tile(self.mask_N1CS, (B, 1, 1, 1))
        mix_NHCK = ops.attention(*self.chunked(q_BHTK, k_BGTK, v_BGTK), mask)
        return mix_NHCK.reshape(B, -1, H, C, K).swapaxes(1, 2).reshape(B, H, -1, K)[:, :, :T]

    def in_turn(self, q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array) -> mx.array:
        """Only q, k and v are kept; backward the scores of some chunks are computed after those of others."""
        forward = mx.custom_function(self.at_once)

        @forward.vjp
        def backward(primals: tuple, d_BHTK: mx.array, _: mx.array) -> list[mx.array]:
            qkv = mx.depends(list(primals), [d_BHTK])
            d_NHCK = chunks_of(d_BHTK, chunk_of(self.window)).flatten(0, 1)
            gradients = gradients_in_turn([*self.chunked(*qkv), d_NHCK], self.mask_N1CS)
            return mx.vjp(lambda *qkv: list(self.chunked(*qkv)), qkv, gradients)[1]

        return forward(q_BHTK, k_BGTK, v_BGTK)

    def chunked(
        self, q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """q (B N, H, C, K); k and v (B N, G, S, K) with the chunks before each."""
        C, before = chunk_of(self.window), chunks_before(self.window)
        keys, values = (with_chunks_before(chunks_of(x, C), before) for x in (k_BGTK, v_BGTK))
        return chunks_of(q_BHTK, C).flatten(0, 1), keys, values


def band_of(tokens: int, window: int) -> Band:
    """The mask of each chunk: the key is at most window - 1 before the query."""
    C = chunk_of(window)
    query_C1, key_S = mx.arange(C)[:, None], mx.arange(C - keys_of(window), C)
    in_window_CS = (key_S <= query_C1) & (query_C1 - key_S < window)
    exists_N1S = C * mx.arange(-(-tokens // C))[:, None, None] + key_S >= 0
    return Band(window, (in_window_CS & exists_N1S)[:, None])


def gradients_in_turn(arrays: list[mx.array], mask_N1CS: mx.array) -> list[mx.array]:
    """Of q, k and v, given these and the gradient of `ops.attention`; at most MAX_SCORES scores at once."""
    num, H, C, _ = arrays[0].shape
    size = max(1, MAX_SCORES // (H * C * mask_N1CS.shape[-1]))
    mask = mx.tile(mask_N1CS, (num // len(mask_N1CS), 1, 1, 1))
    gradients: list[list[mx.array]] = []
    for start in range(0, num, size):
        part = slice(start, start + size)
        *qkv, d = mx.depends([x[part] for x in arrays], gradients[-1] if gradients else [])
        masked = partial(ops.attention, mask_B1TS=mask[part])
        gradients.append(mx.vjp(masked, qkv, [d])[1])
    return [mx.concatenate(list(of_parts)) for of_parts in zip(*gradients, strict=True)]


def chunks_of(x_BHTK: mx.array, chunk: int) -> mx.array:
    """(B, N, H, C, K), the last chunk filled up with zeros."""
    padding = -x_BHTK.shape[2] % chunk
    if padding:
        x_BHTK = mx.pad(x_BHTK, [(0, 0), (0, 0), (0, padding), (0, 0)])
    return mx.unflatten(x_BHTK, 2, (-1, chunk)).swapaxes(1, 2)


def with_chunks_before(x_BNGCK: mx.array, before: int) -> mx.array:
    """(B N, G, S, K): each chunk after the ones before it; before the first there are zeros."""
    N = x_BNGCK.shape[1]
    padded = mx.pad(x_BNGCK, [(0, 0), (before, 0), (0, 0), (0, 0), (0, 0)])
    return mx.concatenate([padded[:, n : n + N] for n in range(before + 1)], axis=3).flatten(0, 1)
