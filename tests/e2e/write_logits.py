"""Write the real model's logits for token numbers: `python -m tests.e2e.write_logits OUT.npy 1 2 3`."""

from __future__ import annotations

import sys

from mlx_impl.machine.blas import load_optimized_blas


def main(path: str, *tokens: str) -> None:
    load_optimized_blas()
    import mlx.core as mx
    import numpy as np

    from mlx_impl.files.checkpoint import load_model

    logits_BTV = load_model(None).model(mx.array([[int(token) for token in tokens]]))
    np.save(path, np.array(logits_BTV[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
