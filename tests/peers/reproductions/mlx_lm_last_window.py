"""mlx-lm 0.32.2 does not train on an incomplete last window of micro-batches.

Three micro-batches, two of them an update; only the third has token 3. Prints:

expected: the weights of token 3 change
got: the weights of token 3 are as before
"""

from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import SGD
from mlx_lm.tuner.trainer import TrainingArgs, train

batches = [(mx.array([[token, token]]), mx.array([[0, 2]])) for token in (1, 2, 3)]
model = nn.Embedding(4, 4)
start = model.weight[3]
settings = TrainingArgs(iters=3, grad_accumulation_steps=2, adapter_file=mkdtemp() + "/a.safetensors")
train(model, SGD(1.0), [], args=settings, iterate_batches=lambda **_: batches)
print("expected: the weights of token 3 change")
print("got: the weights of token 3", "are as before" if mx.array_equal(model.weight[3], start) else "change")
