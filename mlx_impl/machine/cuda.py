"""How MLX hands its kernels to an NVIDIA GPU: one by one in training, not as CUDA graphs.

MLX collects 100 kernels in a CUDA graph. In a training step most of these graphs hold matmuls that CUDA
cannot update in place, so that each is built anew, and the GPU waits for the host.
Source: `CommandEncoder::commit` and `subgraph_to_key` in backend/cuda/device.cpp of MLX (0.32.4).
"""

from __future__ import annotations

import os
import sys

IN_TRAINING = {
    "MLX_USE_CUDA_GRAPHS": "0",
    "MLX_MAX_OPS_PER_BUFFER": "50",  # kernels whose inputs are freed together: with 100 a step holds more
}


def launch_kernels_one_by_one() -> None:
    """Set what MLX reads when it first computes on a GPU, unless the user has set it. A Mac is left alone."""
    if sys.platform == "linux":
        for name, value in IN_TRAINING.items():
            os.environ.setdefault(name, value)
