"""peft 0.21.2 unmerges by subtraction, so that the base weights come back rounded.

Prints:

expected: 0 of 64 weights changed
got: 14 of 64 weights changed
"""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

torch.manual_seed(0)
model: Any = torch.nn.Sequential(torch.nn.Linear(8, 8))
inject_adapter_in_model(LoraConfig(target_modules=["0"], init_lora_weights=False), model)
before = model[0].base_layer.weight.clone()
model[0].merge()
model[0].unmerge()
print("expected: 0 of 64 weights changed")
print(f"got: {(model[0].base_layer.weight != before).sum()} of 64 weights changed")
