"""mlx-lm 0.32.2 counts the pad token after each row's end as a target.

The prompt is 5, 6, the answer 7, 8, 9. The model is certain of each right token, and knows nothing after
the end. Prints:

expected: 3 targets, loss 0.000
got: 4 targets, loss 1.040
"""

import mlx.core as mx
from mlx_lm.tuner.trainer import default_loss, iterate_batches

tokens, lengths = next(iterate_batches([([5, 6, 7, 8, 9], 2)], 1, 2048))
is_text = mx.arange(1, tokens.shape[1]) < 5
logits = 100 * mx.eye(64)[tokens[:, 1:]] * is_text[None, :, None]
loss, num_targets = default_loss(lambda _: logits, tokens, lengths)
print("expected: 3 targets, loss 0.000")
print(f"got: {num_targets.item()} targets, loss {loss.item():.3f}")
