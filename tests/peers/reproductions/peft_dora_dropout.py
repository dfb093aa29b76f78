"""peft 0.21.2 applies DoRA's dropout to the input of the frozen weight too, while training.

torchtune and mlx-lm leave W x whole. B is 0 and the magnitude twice the weight's, so that the output is
twice that of the linear. Prints:

expected: 0.000
got: 0.657
"""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

torch.manual_seed(0)
model: Any = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
x, right = torch.ones(1, 8), model(torch.ones(1, 8))
inject_adapter_in_model(LoraConfig(target_modules=["0"], use_dora=True, lora_dropout=0.5), model)
with torch.no_grad():
    model[0].lora_magnitude_vector["default"].weight *= 2
print("expected: 0.000")
print(f"got: {(model.train()(x) - 2 * right).abs().max().item():.3f}")
