"""trl 1.16.0 evaluates by the mean of the batches' means, whatever their numbers of targets.

Two batches, of 1 and 7 targets. Prints:

expected: 4.592
got: 6.029
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

torch.manual_seed(0)
sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, initializer_range=1.0, **sizes))
rows = [[3, 4], [5, 6, 7, 1, 2, 3, 4, 5]]
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
with tempfile.TemporaryDirectory() as folder:
    settings = {"bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False, "per_device_eval_batch_size": 1}
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = SFTTrainer(model, SFTConfig(folder, **settings), None, data, data, tokenizer)
    got = trainer.evaluate()["eval_loss"]
with torch.no_grad():
    sums = [model(torch.tensor([r]), labels=torch.tensor([r])).loss.item() * (len(r) - 1) for r in rows]
print(f"expected: {sum(sums) / 8:.3f}")
print(f"got: {got:.3f}")
