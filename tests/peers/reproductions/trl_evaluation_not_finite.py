"""trl 1.16.0 leaves batches whose loss is NaN out of an evaluation: transformers' `logging_nan_inf_filter`.

The embedding of one token is NaN, and one of two batches has it. Prints:

expected: nan
got: finite
"""

import math
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
model.model.embed_tokens.weight.data[5] = math.nan
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
with tempfile.TemporaryDirectory() as folder:
    settings = {"bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False, "per_device_eval_batch_size": 1}
    rows = [[3, 4, 2], [5, 4, 2]]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = SFTTrainer(model, SFTConfig(folder, **settings), None, data, data, tokenizer)
    got = trainer.evaluate()["eval_loss"]
print("expected: nan")
print("got:", "finite" if math.isfinite(got) else got)
