"""unsloth-zoo 2026.10.9 draws dropout masks anew when a checkpointed block is recomputed, on MLX.

f is linear in B, so <B, df/dB> is f. With other masks in the backward pass it is not. Prints:

expected: f = 1072, <B, df/dB> = 1072
got: f = 1072, <B, df/dB> = 1216
"""

import os

os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear
from unsloth_zoo.mlx.utils import apply_gradient_checkpointing


class Block(LoRALinear):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Block(8, 4, r=2, dropout=0.5, scale=1.0)]

    def __call__(self, x):
        return self.layers[0](x)


model = Model()
layer = model.layers[0]
layer.linear.weight, layer.lora_a, layer.lora_b = mx.zeros((4, 8)), mx.ones((8, 2)), mx.ones((2, 4))
layer.linear.freeze()
apply_gradient_checkpointing(model)
mx.random.seed(1)
f, gradients = nn.value_and_grad(model, lambda model, x: model(x).sum())(model, mx.ones((16, 8)))
product = (gradients["layers"][0]["lora_b"] * layer.lora_b).sum().item()
print(f"expected: f = {f.item():.0f}, <B, df/dB> = {f.item():.0f}")
print(f"got: f = {f.item():.0f}, <B, df/dB> = {product:.0f}")
