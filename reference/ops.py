"""The primitives of the model, PyTorch's own where it has them.

Differs from mlx_impl/ops.py: position ids and a mask always; no log-sum-exp, because PyTorch's
`cross_entropy` has it inside; nothing is widened, because the reference runs in float32 and float64 only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps)."""
    return functional.rms_norm(x_BTD, weight_D.shape, weight_D, eps)


def rope(x_BHTK: Tensor, frequency_P: Tensor, position_BT: Tensor) -> Tensor:
    """Rotate each pair (x[k], x[k + K/2]) by the angle position * frequency[k]."""
    angle_B1TP = position_BT.to(x_BHTK.dtype)[:, None, :, None] * frequency_P.to(x_BHTK.dtype)
    cos, sin = angle_B1TP.cos(), angle_B1TP.sin()
    left, right = x_BHTK.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask_B1TT: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys where the mask is true."""
    return functional.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, mask_B1TT, enable_gqa=True)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return functional.silu(x)
