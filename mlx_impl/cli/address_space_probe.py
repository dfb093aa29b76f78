"""`python -m mlx_impl.cli.address_space_probe [BLAS]`: print the program's address space in bytes.

It imports every library and starts every thread that a command does, without a model. See address_space.py.
"""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

from ..machine.address_space import use_one_malloc_arena
from ..machine.blas import load_optimized_blas

STATUS = Path("/proc/self/status")
MATRIX_SIZE = 512  # large enough that a BLAS starts its threads


def load_everything(blas: str | None) -> None:
    use_one_malloc_arena()
    load_optimized_blas(blas)
    import gguf  # noqa: F401
    import mlx.core as mx
    import numpy as np
    from matplotlib import pyplot

    from .training import finetune  # noqa: F401

    thread = threading.Thread(target=np.ones(1).sum)  # a progress bar has a thread of its own
    thread.start()
    square = mx.ones((MATRIX_SIZE, MATRIX_SIZE))
    mx.eval(square @ square)
    mx.eval((square @ square).astype(mx.float32).sum())
    np.ones((MATRIX_SIZE, MATRIX_SIZE)) @ np.ones((MATRIX_SIZE, MATRIX_SIZE))
    figure, axes = pyplot.subplots()
    axes.plot([0, 1])
    figure.savefig(io.BytesIO())
    thread.join()


def peak_bytes() -> int:
    """VmPeak: the most address space that this process has mapped at once."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak:")) * 1024


if __name__ == "__main__":
    load_everything((sys.argv[1] if sys.argv[1:] else None) or None)
    print(peak_bytes())
