"""mlx-lm-lora 5.10.2 gives every rank the same rows, so the other rows are never trained on.

Eight examples in batches of four on two ranks; an example is known by its first token. Prints:

expected: rank 0 and rank 1 together have 8 of 8 examples
got: rank 0 and rank 1 together have 4 of 8 examples
"""

from types import SimpleNamespace

import mlx.core as mx
from mlx_lm_lora.trainer.sft_trainer import iterate_batches

examples = [([token, 9, 9], 0) for token in range(8)]
seen = set()
for rank in range(2):
    group = SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank)
    mx.distributed.init = lambda *_, group=group, **__: group  # as on this rank
    for tokens, _ in iterate_batches(examples, batch_size=4, max_seq_length=2048):
        seen.update(tokens[:, 0].tolist())
print("expected: rank 0 and rank 1 together have 8 of 8 examples")
print(f"got: rank 0 and rank 1 together have {len(seen)} of 8 examples")
