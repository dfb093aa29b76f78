"""mlx-vlm 0.7.10 trains with mlx.optimizers.AdamW, which corrects no bias unless it is told to.

PyTorch's first update moves a weight by one learning rate. Prints:

expected: 1.000 learning rates
got: 3.162 learning rates
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import AdamW  # what mlx_vlm.train builds, with learning_rate and weight_decay alone
from mlx_vlm.trainer.common.utils import apply_accumulated_gradients

model = nn.Embedding(1, 1)
before = model.weight.item()
apply_accumulated_gradients(model, AdamW(1e-3, weight_decay=0), {"weight": mx.ones((1, 1))}, 1)
print("expected: 1.000 learning rates")
print(f"got: {(before - model.weight.item()) / 1e-3:.3f} learning rates")
