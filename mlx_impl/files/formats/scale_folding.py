"""A scale into a factor B and out of it again, to the bit.

B * ratio, where it is no float32 number, is the sum of two, hi + lo, and [hi; lo] stands beside [A, A]: the
function is the same to 2**-48, and (hi + lo) / ratio, rounded, is B again.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .factors import Tensors


def scaled(factors: Tensors, ratio: float) -> Tensors:
    """Factors of the same function at a scale that is so many times smaller; A is doubled where B is."""
    if ratio == 1:
        return dict(factors)
    product_RO = to_float64(factors["lora_b"]) * ratio
    hi_RO = to_float32(product_RO)
    lo_RO = to_float32(product_RO - hi_RO)
    if not np.isfinite(hi_RO).all():
        raise ValueError("a factor B is too large for the scale of the other linears")
    a_IR, both = factors["lora_a"], lo_RO.any()
    b_RO = np.concatenate([hi_RO, lo_RO]) if both else hi_RO
    exact = mx.array(b_RO).astype(factors["lora_b"].dtype)  # half precision stays where it suffices
    suffices = not both and np.array_equal(to_float64(exact), b_RO)
    return {
        **factors,
        "lora_a": mx.concatenate([a_IR, a_IR], axis=1) if both else a_IR,
        "lora_b": exact if suffices else mx.array(b_RO),
    }


def unscaled(factors: Tensors, rank: int, ratio: float) -> mx.array:
    """The B that `scaled` was given, of this rank."""
    b_RO, dtype = factors["lora_b"], factors["lora_a"].dtype  # that of A: B may have been widened
    if ratio == 1:
        return b_RO[:rank]
    hi_RO, lo_RO = to_float64(b_RO[:rank]), to_float64(b_RO[rank : 2 * rank])
    lo_RO = np.pad(lo_RO, ((0, rank - len(lo_RO)), (0, 0)))
    product_RO = np.where(lo_RO == 0, hi_RO, hi_RO + lo_RO)  # -0 + 0 would lose the sign
    return mx.array(to_float32(product_RO / ratio)).astype(dtype)


def alpha_for(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is the scale, to the bit where there is one, else in float32.

    Between a power of two and the next the doubles that are multiples of 1 / rank can be fewer than all.
    """
    alpha = float(scale) * rank
    near = (alpha, float(np.nextafter(alpha, 0.0)), float(np.nextafter(alpha, np.inf)))
    best = min(near, key=lambda a: (abs(a / rank - scale), np.float32(a / rank) != np.float32(scale)))
    if np.float32(best / rank) != np.float32(scale):
        raise ValueError(f"the scale {scale} is alpha / {rank} for no alpha")
    return best


def to_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return array.astype(np.float32)


def to_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
