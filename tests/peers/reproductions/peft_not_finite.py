"""peft 0.21.2 on transformers 5.23.0 generates tokens from logits that are NaN, without a word.

An embedding that is NaN. Prints:

expected: an error
got: tokens [0, 0, 0]
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
model: Any = get_peft_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), LoraConfig())
torch.nn.init.constant_(model.get_input_embeddings().weight, float("nan"))
prompt = torch.tensor([[1, 2]])
answer = model.generate(
    input_ids=prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=3,
    do_sample=False,
    eos_token_id=15,
)
print("expected: an error")
print("got: tokens", answer[0, 2:].tolist())
