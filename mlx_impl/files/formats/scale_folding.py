"""Multiply a factor B by a ratio of scales, and divide by it again to get back every bit of B.

Where float32 cannot hold B * ratio, it is split into a sum of two float32 matrices, hi + lo. B becomes
[hi; lo] and A becomes [A, A], with twice the rank: the update is the same to a relative 2**-48, and
(hi + lo) / ratio rounds to B.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .factors import Tensors


def fold_scale(factors: Tensors, ratio: float) -> Tensors:
    """The factors with B multiplied by `ratio`; their rank doubles if B has to be split."""
    if ratio == 1:
        return dict(factors)
    product_RO = to_float64(factors["lora_b"]) * ratio
    hi_RO = to_float32(product_RO)
    lo_RO = to_float32(product_RO - hi_RO)
    if not np.isfinite(hi_RO).all():
        raise ValueError("a factor B is too large for the scale of the other linears")
    a_IR, is_split = factors["lora_a"], lo_RO.any()
    b_RO = np.concatenate([hi_RO, lo_RO]) if is_split else hi_RO
    stored = mx.array(b_RO).astype(factors["lora_b"].dtype)  # half precision is kept where it is exact
    is_exact = not is_split and np.array_equal(to_float64(stored), b_RO)
    return {
        **factors,
        "lora_a": mx.concatenate([a_IR, a_IR], axis=1) if is_split else a_IR,
        "lora_b": stored if is_exact else mx.array(b_RO),
    }


def unfold_scale(factors: Tensors, rank: int, ratio: float) -> mx.array:
    """The B of this rank that `fold_scale` got."""
    b_RO, dtype = factors["lora_b"], factors["lora_a"].dtype  # of A, since B may have become float32
    if ratio == 1:
        return b_RO[:rank]
    hi_RO, lo_RO = to_float64(b_RO[:rank]), to_float64(b_RO[rank : 2 * rank])
    lo_RO = np.pad(lo_RO, ((0, rank - len(lo_RO)), (0, 0)))
    product_RO = np.where(lo_RO == 0, hi_RO, hi_RO + lo_RO)  # -0 + 0 would lose the sign
    return mx.array(to_float32(product_RO / ratio)).astype(dtype)


def alpha_for(scale: float, rank: int) -> float:
    """The alpha with alpha / rank == scale; where no double gives that exactly, equal in float32.

    Not every double is some other double divided by `rank`.
    """
    alpha = float(scale) * rank
    candidates = (alpha, float(np.nextafter(alpha, 0.0)), float(np.nextafter(alpha, np.inf)))
    best = min(candidates, key=lambda a: (abs(a / rank - scale), np.float32(a / rank) != np.float32(scale)))
    if np.float32(best / rank) != np.float32(scale):
        raise ValueError(f"no alpha gives the scale {scale} as alpha / {rank}")
    return best


def to_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return array.astype(np.float32)


def to_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
