"""mlx-lm 0.32.2 computes the learning rate in float32, which loses digits at the end of a long run.

The last of 10,000 updates on a cosine, as a share of the peak. Prints:

expected: 2.467e-08
got: 2.980e-08
"""

import math

import mlx.core as mx
from mlx_lm.tuner.utils import build_schedule

rate = build_schedule({"name": "cosine_decay", "arguments": [1.0, 10_000]})
print(f"expected: {(1 + math.cos(math.pi * 9_999 / 10_000)) / 2:.3e}")
print(f"got: {rate(mx.array(9_999)).item():.3e}")
