"""Attention with a sliding window, in chunks as long as the window: memory grows with T, not with T^2.

With a window of w tokens a query sees its own key and the w - 1 before it. Rows are cut into chunks of w
tokens; the queries of a chunk see keys of it and of the chunk before, 2 w of them. The scores, of shape
(B T / w, H, w, 2 w), are a band along the diagonal of T x T. With a mask of T x T MLX's attention keeps T T
scores for the gradient on a CPU; on CUDA it makes the mask a number for each of them.
Source: Beltagy et al. 2020, "Longformer", section 3.1 and appendix A (chunks of a sliding window).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from . import ops

MIN_TOKENS = 512  # of a row: below, a mask of (T, T) is small
MIN_WINDOWS = 3  # in a row: with two, a band has as many scores as T x T
MAX_SCORES = 2**27  # in the backward pass at once, on a GPU: 256 MiB in bfloat16


def pays(tokens: int, window: int) -> bool:
    return tokens >= max(MIN_TOKENS, MIN_WINDOWS * window)


@dataclass(frozen=True)
class Band:
    """N chunks of `window` positions in each row, the last one filled up."""

    window: int
    mask_N1WS: mx.array

    def attend(self, q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array) -> mx.array:
        """`ops.attention` with `model.attention_mask` of this window; (B, H, T, K)."""
        B, H, T, K = q_BHTK.shape
        keys, values = (with_chunk_before(chunks_of(x, self.window)) for x in (k_BGTK, v_BGTK))
        queries = chunks_of(q_BHTK, self.window).flatten(0, 1)
        mix = in_turn(queries, keys, values, mx.tile(self.mask_N1WS, (B, 1, 1, 1)))
        return mix.reshape(B, -1, H, self.window, K).swapaxes(1, 2).reshape(B, H, -1, K)[:, :, :T]


def band_of(tokens: int, window: int) -> Band:
    """The mask of each chunk: the key is at most window - 1 before the query."""
    num_chunks = -(-tokens // window)
    query_W1, key_S = mx.arange(window)[:, None], mx.arange(-window, window)
    in_window_WS = (key_S <= query_W1) & (query_W1 - key_S < window)
    exists_N1S = (mx.arange(num_chunks)[:, None] > 0)[..., None] | (key_S >= 0)
    return Band(window, (in_window_WS & exists_N1S)[:, None])


def in_turn(q_NHWK: mx.array, k_NGSK: mx.array, v_NGSK: mx.array, mask_N1WS: mx.array) -> mx.array:
    """`ops.attention`; on a GPU its backward pass computes the scores of some chunks after those of others.

    A CPU keeps the scores of the forward pass, all of them.
    """
    N, H, W, _ = q_NHWK.shape
    size = max(1, MAX_SCORES // (H * W * k_NGSK.shape[2]))
    if not ops.on_gpu() or size >= N:
        return ops.attention(q_NHWK, k_NGSK, v_NGSK, mask_N1WS)
    parts = [slice(first, first + size) for first in range(0, N, size)]

    @mx.custom_function
    def forward(q_NHWK: mx.array, k_NGSK: mx.array, v_NGSK: mx.array) -> mx.array:
        return ops.attention(q_NHWK, k_NGSK, v_NGSK, mask_N1WS)

    @forward.vjp
    def backward(primals: tuple, d_NHWK: mx.array, _: mx.array) -> list[mx.array]:
        gradients: list[list[mx.array]] = []
        for part in parts:
            arrays = [x[part] for x in (*primals, d_NHWK)]
            *qkv, d = mx.depends(arrays, gradients[-1]) if gradients else arrays
            mask = mask_N1WS[part]
            gradients.append(mx.vjp(lambda q, k, v, mask=mask: ops.attention(q, k, v, mask), qkv, [d])[1])
        return [mx.concatenate(list(of_parts)) for of_parts in zip(*gradients, strict=True)]

    return forward(q_NHWK, k_NGSK, v_NGSK)


def chunks_of(x_BHTK: mx.array, window: int) -> mx.array:
    """(B, N, H, W, K), the last chunk filled up with zeros."""
    padding = -x_BHTK.shape[2] % window
    if padding:
        x_BHTK = mx.pad(x_BHTK, [(0, 0), (0, 0), (0, padding), (0, 0)])
    return mx.unflatten(x_BHTK, 2, (-1, window)).swapaxes(1, 2)


def with_chunk_before(x_BNGWK: mx.array) -> mx.array:
    """(B N, G, 2 W, K): each chunk after the one before it; before the first there are zeros."""
    before = mx.pad(x_BNGWK[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])
    return mx.concatenate([before, x_BNGWK], axis=3).flatten(0, 1)
