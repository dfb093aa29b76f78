"""mlx-lm 0.32.2 trains with mlx.optimizers.AdamW, which corrects no bias unless it is told to.

PyTorch's first update moves a weight by one learning rate. Prints:

expected: 1.000 learning rates
got: 3.162 learning rates
"""

import mlx.core as mx
from mlx.optimizers import AdamW  # what mlx_lm.lora builds, with learning_rate alone

moved = AdamW(1e-3, weight_decay=0).apply_gradients({"w": mx.ones(1)}, {"w": mx.zeros(1)})["w"]
print("expected: 1.000 learning rates")
print(f"got: {-moved.item() / 1e-3:.3f} learning rates")
