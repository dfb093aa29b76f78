"""`python -m mlx_impl.cli.address_space_probe [BLAS]`: bytes of address space of a command without a model.

It loads what a command loads and starts the threads that it starts; see `address_space.py`.
"""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

from ..machine.address_space import share_pools
from ..machine.blas import load_optimized_blas

STATUS = Path("/proc/self/status")
SIDE = 512  # of a matrix that a BLAS multiplies by several threads


def start(blas: str | None) -> None:
    share_pools()
    load_optimized_blas(blas)
    import gguf  # noqa: F401
    import mlx.core as mx
    import numpy as np
    from matplotlib import pyplot

    from .training import finetune  # noqa: F401

    thread = threading.Thread(target=np.ones(1).sum)  # as a progress bar has one
    thread.start()
    square = mx.ones((SIDE, SIDE))
    mx.eval(square @ square)
    mx.eval((square @ square).astype(mx.float32).sum())
    np.ones((SIDE, SIDE)) @ np.ones((SIDE, SIDE))
    figure, axes = pyplot.subplots()
    axes.plot([0, 1])
    figure.savefig(io.BytesIO())
    thread.join()


def peak_bytes() -> int:
    """VmPeak: the most address space that this process had."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak:")) * 1024


if __name__ == "__main__":
    start((sys.argv[1] if sys.argv[1:] else None) or None)
    print(peak_bytes())
