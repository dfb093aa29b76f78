"""unsloth-zoo 2026.10.9 stops the run, on MLX, where one of an update's micro-batches has no target.

Two micro-batches, of 2 targets and of none. Prints:

expected: an update by 2 targets
got: Unsloth MLX: a training batch produced zero supervised tokens
"""

import os
from tempfile import mkdtemp

os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")

import mlx.core as mx
import mlx.nn as nn
from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

tokens, ends = mx.array([[1, 2, 3]]), mx.array([[0, 3]])
settings = MLXTrainingConfig(max_steps=1, gradient_accumulation_steps=2, use_cce=False, output_dir=mkdtemp())
trainer = MLXTrainer(nn.Embedding(4, 4), None, None, args=settings)
trainer._batches = [(tokens, ends, tokens), (tokens, ends, mx.full((1, 3), -100))]
trainer.save_model = lambda *_, **__: None
try:
    trainer.train()
    got = "an update by 2 targets"
except ValueError as error:
    got = str(error).split(" after")[0]
print("expected: an update by 2 targets")
print("got:", got)
