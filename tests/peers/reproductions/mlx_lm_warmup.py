"""mlx-lm 0.32.2 holds the peak for two updates after a warmup, and ends the decay one update late.

Ten updates: four of warmup, then linearly to zero, in sixths of the peak. Prints:

expected: 0.0 1.5 3.0 4.5 6.0 5.0 4.0 3.0 2.0 1.0
got: 0.0 1.5 3.0 4.5 6.0 6.0 5.0 4.0 3.0 2.0
"""

import mlx.core as mx
from mlx_lm.tuner.utils import build_schedule

rate = build_schedule({"name": "linear_schedule", "arguments": [6.0, 0.0, 10 - 4], "warmup": 4})
print("expected: 0.0 1.5 3.0 4.5 6.0 5.0 4.0 3.0 2.0 1.0")
print("got:", *(f"{rate(mx.array(update)).item():.1f}" for update in range(10)))
