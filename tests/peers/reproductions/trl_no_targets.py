"""trl 1.16.0 gives a batch without targets the loss 0: it divides by at least 1.

Its own data sets have no such row: it drops them. An evaluation would count the batch as perfect. Prints:

expected: loss nan, or an error
got: loss 0.0
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
with tempfile.TemporaryDirectory() as folder:
    settings = {"bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False}
    data = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]})
    trainer = SFTTrainer(model, SFTConfig(folder, **settings), None, data, None, tokenizer)
    tokens = torch.tensor([[3, 4]])
    batch = {"input_ids": tokens, "attention_mask": tokens > 0, "labels": torch.full_like(tokens, -100)}
    loss = trainer.compute_loss(trainer.model, batch)
print("expected: loss nan, or an error")
print("got: loss", loss.item())
