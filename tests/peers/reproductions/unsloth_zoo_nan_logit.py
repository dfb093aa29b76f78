"""unsloth-zoo 2026.10.9 has a loss of NaN, on MLX, where a logit is NaN at a position that is no target.

It is taken times 0. Three positions, the second not a target. Prints:

expected: loss 1.386
got: loss nan
"""

import os

os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")

import mlx.core as mx
from unsloth_zoo.mlx.utils import make_baseline_loss_fn

logits = mx.zeros((1, 3, 4))
logits[0, 1] = float("nan")
tokens, labels = mx.array([[1, 2, 3, 1]]), mx.array([[-100, 2, -100, 1]])
loss, _ = make_baseline_loss_fn()(lambda _: logits, tokens, mx.array([[0, 4]]), labels)
print("expected: loss 1.386")
print(f"got: loss {loss.item():.3f}")
