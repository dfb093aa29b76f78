"""mlx-vlm 0.7.10 draws dropout masks anew when a checkpointed block is recomputed.

f is linear in B, so <B, df/dB> is f. With other masks in the backward pass it is not. Prints:

expected: f = 1072, <B, df/dB> = 1072
got: f = 1072, <B, df/dB> = 1216
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.trainer.common.utils import grad_checkpoint
from mlx_vlm.trainer.peft import LoRALinear


class Block(LoRALinear):
    pass


layer = Block(8, 4, r=2, dropout=0.5, scale=1.0)
layer.linear.weight, layer.lora_a, layer.lora_b = mx.zeros((4, 8)), mx.ones((8, 2)), mx.ones((2, 4))
layer.linear.freeze()
grad_checkpoint(layer)
mx.random.seed(1)
f, gradients = nn.value_and_grad(layer, lambda model, x: model(x).sum())(layer, mx.ones((16, 8)))
product = (gradients["lora_b"] * layer.lora_b).sum().item()
print(f"expected: f = {f.item():.0f}, <B, df/dB> = {f.item():.0f}")
print(f"got: f = {f.item():.0f}, <B, df/dB> = {product:.0f}")
