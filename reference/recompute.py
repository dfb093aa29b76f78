"""Gradient checkpointing: activations are recomputed in the backward pass instead of kept.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
Differs from mlx_impl/recompute.py: PyTorch's `checkpoint` restores its random state, so dropout draws the
same mask again, and it finds the parameters by itself.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(layer: nn.Module, x_BTD: Tensor, *others: object) -> Tensor:
    """layer(x, *others); only x is kept for the backward pass."""
    return checkpoint(layer, x_BTD, *others, use_reentrant=False)
