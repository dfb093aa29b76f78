"""mlx-lm 0.32.2 generates tokens from logits that are NaN, without a word.

Prints:

expected: an error
got: tokens [0, 0, 0]
"""

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.llama import Model, ModelArgs

model = Model(ModelArgs("llama", 8, 1, 16, 2, 1e-5, 16))  # its head is the embedding
model.model.embed_tokens.weight = mx.full((16, 8), mx.nan)
print("expected: an error")
print("got: tokens", [int(token) for token, _ in generate_step(mx.array([1, 2]), model, max_tokens=3)])
