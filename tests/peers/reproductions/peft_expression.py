"""peft 0.21.2 refuses an expression that matches a module which is no linear layer; it does not pass it over.

Prints:

expected: 3 adapted
got: ValueError: Target module SiLUActivation() is not supported.
"""

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
print("expected: 3 adapted")
try:
    adapted = get_peft_model(model, LoraConfig(target_modules=r"model\.layers\.0\.mlp\.\w+"))
    print(f"got: {sum(name.endswith('base_layer') for name, _ in adapted.named_modules())} adapted")
except ValueError as error:
    print(f"got: ValueError: {str(error).partition('.')[0]}.")
