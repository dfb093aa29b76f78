"""trl 1.16.0 reports a loss of 0 where it is NaN: transformers' `logging_nan_inf_filter` is on by default.

An embedding that is NaN. Prints:

expected: nan
got: 0.0
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
torch.nn.init.constant_(model.model.embed_tokens.weight, float("nan"))
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
with tempfile.TemporaryDirectory() as folder:
    settings = {"bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False, "logging_steps": 1, "max_steps": 1, "save_strategy": "no"}
    data = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]})
    trainer = SFTTrainer(model, SFTConfig(folder, **settings), None, data, None, tokenizer)
    trainer.train()
print("expected: nan")
print(f"got: {trainer.state.log_history[0]['loss']}")
