"""peft 0.21.2 loads a file that lacks a factor, with a warning: the factor stays as it was drawn.

Prints:

expected: an error
got: UserWarning: Found missing adapter keys while loading the checkpoint
"""

import tempfile
import warnings
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
    get_peft_model(model, LoraConfig(target_modules=["v_proj"])).save_pretrained(folder)
    file = Path(folder) / "adapter_model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if "lora_B" not in n}, file)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    warnings.simplefilter("always")
    PeftModel.from_pretrained(model, folder)
print("expected: an error")
said = next(str(one.message) for one in caught if "missing" in str(one.message))
print(f"got: UserWarning: {said.partition(':')[0]}")
