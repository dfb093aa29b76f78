"""mlx-lm-lora 5.10.2 draws its training batches with replacement: an epoch leaves examples out.

Every step makes a new iterator and takes its first batch. Eight examples, eight steps of one. Prints:

expected: 8 of 8 examples in eight steps
got: 5 of 8 examples in eight steps
"""

from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import SGD
from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs, iterate_batches, train_sft

mx.device_info = lambda: {"max_recommended_working_set_size": 0}  # train_sft asks for it; only a Mac has it


class Model(nn.Embedding):
    layers = ()

    def __call__(self, tokens, cache=None):
        return super().__call__(tokens)


def recorded(**given):
    for tokens, lengths in iterate_batches(**given):
        seen.add(tokens[0, 0].item())
        yield tokens, lengths


seen, examples = set(), [([token, 9, 9], 0) for token in range(8)]
settings = SFTTrainingArgs(iters=8, batch_size=1, adapter_file=mkdtemp() + "/a.safetensors")
np.random.seed(0)
train_sft(Model(10, 10), SGD(0.1), examples, args=settings, iterate_batches=recorded)
print("expected: 8 of 8 examples in eight steps")
print(f"got: {len(seen)} of 8 examples in eight steps")
