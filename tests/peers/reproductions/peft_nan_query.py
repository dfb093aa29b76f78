"""peft 0.21.2 on transformers 5.23.0 and torch 2.13.0 answers with numbers where a query is NaN.

On a CPU, torch's `scaled_dot_product_attention` without a mask gives 0 for such a query (pytorch#141128):
a broken q_proj goes unseen. Prints:

expected: logits nan
got: logits finite
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
model: Any = get_peft_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), LoraConfig())
layer = model.get_base_model().model.layers[0].self_attn
torch.nn.init.constant_(layer.q_proj.base_layer.weight, float("nan"))
logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
print("expected: logits nan")
print("got: logits", "finite" if logits.isfinite().all() else "nan")
