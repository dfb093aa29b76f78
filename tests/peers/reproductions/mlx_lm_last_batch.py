"""mlx-lm 0.32.2 never trains on the examples of an incomplete last batch.

Five examples in batches of two; an example is known by its last token. Prints:

expected: examples 10 11 12 13 14
got: examples 10 11 12 13
"""

from mlx_lm.tuner.trainer import iterate_batches

examples = [([1, 2, 3, 10 + number], 0) for number in range(5)]
epoch = iterate_batches(examples, batch_size=2, max_seq_length=2048)
print("expected: examples 10 11 12 13 14")
print("got: examples", *sorted(int(row[3]) for tokens, _ in epoch for row in tokens))
