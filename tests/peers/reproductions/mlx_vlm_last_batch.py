"""mlx-vlm 0.7.10 never trains on the examples of an incomplete last batch.

Five examples in batches of two; an example is known by its last token. Prints:

expected: examples 10 11 12 13 14
got: examples 10 11 12 13
"""

import numpy as np
from mlx_vlm.trainer.vlm.sft.runtime import iterate_vlm_batches

examples = [{"input_ids": np.array([1, 2, 3, 10 + number])} for number in range(5)]
epoch = iterate_vlm_batches(examples, batch_size=2, max_seq_length=2048)
print("expected: examples 10 11 12 13 14")
print("got: examples", *sorted(int(row[3]) for batch in epoch for row in batch["input_ids"]))
