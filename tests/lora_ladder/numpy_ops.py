"""The primitives and their pullbacks written out in NumPy, in the precision of the input.

Sources: those of reference/model.py. Each pullback is derived by hand: the gradients of <value, g>.
"""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + x.dtype.type(eps))


def rms_norm_pullback(
    x: np.ndarray, weight: np.ndarray, eps: float, g: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """With r = 1 / sqrt(mean(x^2) + eps): dx = r w g - r^3 x mean(w g x), dw = sum of r x g."""
    r = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + x.dtype.type(eps))
    dx = r * weight * g - r**3 * x * (weight * g * x).mean(-1, keepdims=True)
    return dx, (r * x * g).reshape(-1, x.shape[-1]).sum(0)


def rope(x_BHTK: np.ndarray, frequency_P: tuple[float, ...], offset: int, sign: int = 1) -> np.ndarray:
    """Rotate the pair (x[k], x[k + K/2]) by (t + offset) * frequency[k]. The pullback has sign -1."""
    return rope_at(x_BHTK, frequency_P, offset + np.arange(x_BHTK.shape[-2])[None], sign)


def rope_at(
    x_BHTK: np.ndarray, frequency_P: tuple[float, ...], position_BT: np.ndarray, sign: int = 1
) -> np.ndarray:
    """Rotate by position[b, t] * frequency[k].

    The angle is rounded to the precision of x, as it is in every float32 implementation.
    """
    time_B1T1 = position_BT[:, None, :, None].astype(x_BHTK.dtype)
    angle_B1TP = time_B1T1 * np.array(frequency_P, dtype=x_BHTK.dtype)
    cos, sin = np.cos(angle_B1TP), sign * np.sin(angle_B1TP)
    left, right = np.split(x_BHTK, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal(q_BHTK: np.ndarray, k_BHSK: np.ndarray) -> np.ndarray:
    """A query sees every key up to its own position; the last query is at the last key."""
    T, S = q_BHTK.shape[-2], k_BHSK.shape[-2]
    return np.arange(S) <= np.arange(T)[:, None] + S - T


def scores(q_BHTK: np.ndarray, k_BHSK: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """softmax(q k^T / sqrt(K)) over the keys that the mask allows; without a mask it is causal."""
    products = q_BHTK @ k_BHSK.swapaxes(-1, -2) * q_BHTK.dtype.type(q_BHTK.shape[-1] ** -0.5)
    return softmax(np.where(causal(q_BHTK, k_BHSK) if mask is None else mask, products, -np.inf))


def attention(
    q_BHTK: np.ndarray, k_BGSK: np.ndarray, v_BGSK: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Grouped-query attention: each key/value head serves H / G neighbouring query heads."""
    served = q_BHTK.shape[1] // k_BGSK.shape[1]
    k_BHSK, v_BHSK = k_BGSK.repeat(served, axis=1), v_BGSK.repeat(served, axis=1)
    return scores(q_BHTK, k_BHSK, mask) @ v_BHSK


def attention_pullback(
    q_BHTK: np.ndarray,
    k_BGSK: np.ndarray,
    v_BGSK: np.ndarray,
    g_BHTK: np.ndarray,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With p = softmax(s): ds = p (dp - sum(p dp)). A key/value head sums over its query heads."""
    G = k_BGSK.shape[1]
    served = q_BHTK.shape[1] // G
    k_BHSK, v_BHSK = k_BGSK.repeat(served, axis=1), v_BGSK.repeat(served, axis=1)
    p_BHTS = scores(q_BHTK, k_BHSK, mask)
    dp_BHTS = g_BHTK @ v_BHSK.swapaxes(-1, -2)
    ds_BHTS = p_BHTS * (dp_BHTS - (p_BHTS * dp_BHTS).sum(-1, keepdims=True))
    ds_BHTS *= q_BHTK.dtype.type(q_BHTK.shape[-1] ** -0.5)

    def summed(x_BHSK: np.ndarray) -> np.ndarray:
        B, _, S, K = x_BHSK.shape
        return x_BHSK.reshape(B, G, served, S, K).sum(2)

    dk_BHSK, dv_BHSK = ds_BHTS.swapaxes(-1, -2) @ q_BHTK, p_BHTS.swapaxes(-1, -2) @ g_BHTK
    return ds_BHTS @ k_BHSK, summed(dk_BHSK), summed(dv_BHSK)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def silu_pullback(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """g s (1 + x (1 - s)) with s = sigmoid(x)."""
    s = 1 / (1 + np.exp(-x))
    return g * s * (1 + x * (1 - s))


def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return silu(gate) * up


def gated_pullback(gate: np.ndarray, up: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return silu_pullback(gate, g * up), g * silu(gate)


def logsumexp(x: np.ndarray) -> np.ndarray:
    highest = x.max(-1, keepdims=True)
    return (highest + np.log(np.exp(x - highest).sum(-1, keepdims=True)))[..., 0]


def logsumexp_pullback(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    return softmax(x) * g[..., None]


def cross_entropy(
    logits_NV: np.ndarray, targets_N: np.ndarray, mask_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """-log softmax(logits)[target], and its gradient softmax - onehot; both 0 where the mask is False."""
    rows_N = np.arange(len(targets_N))
    nats_N = logsumexp(logits_NV) - logits_NV[rows_N, targets_N]
    gradient_NV = softmax(logits_NV)
    gradient_NV[rows_N, targets_N] -= 1
    return np.where(mask_N, nats_N, 0), np.where(mask_N[:, None], gradient_NV, 0)
