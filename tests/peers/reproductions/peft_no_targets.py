"""peft 0.21.2 on transformers 5.23.0 gives a batch without targets the loss 0 / 0.

A run that meets such a batch ruins its adapter. Prints:

expected: loss 0.0 or an error
got: loss nan
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
model: Any = get_peft_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), LoraConfig())
tokens = torch.tensor([[1, 2, 3]])
print("expected: loss 0.0 or an error")
print(f"got: loss {model(input_ids=tokens, labels=torch.full_like(tokens, -100)).loss.item()}")
