"""mlx-lm-lora 5.10.2 accumulates the mean of the micro-batches' means, whatever their numbers of targets.

Two micro-batches of 2 and 20 targets are one update, by SGD. The model is a table of logits. Prints:

expected: 0% from the mean over all 22 targets
got: 34% from the mean over all 22 targets
"""

from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import SGD
from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs, default_loss, train_sft

mx.device_info = lambda: {"max_recommended_working_set_size": 0}  # train_sft asks for it; only a Mac has it


class Model(nn.Embedding):
    layers = ()

    def __call__(self, tokens, cache=None):
        return super().__call__(tokens)


batches = [(mx.array([[1] * n + [2]]), mx.array([[0, n + 1]])) for n in (2, 20)]
model, steps = Model(4, 4), iter(batches)
model.weight = start = mx.zeros((4, 4))
gradients = [nn.value_and_grad(model, default_loss)(model, *batch)[1]["weight"] for batch in batches]
wanted = (2 * gradients[0] + 20 * gradients[1]) / 22
settings = SFTTrainingArgs(iters=2, gradient_accumulation_steps=2, adapter_file=mkdtemp() + "/a.safetensors")
train_sft(model, SGD(1.0), [], args=settings, iterate_batches=lambda **_: steps)
error = mx.linalg.norm(start - model.weight - wanted) / mx.linalg.norm(wanted)
print("expected: 0% from the mean over all 22 targets")
print(f"got: {error.item():.0%} from the mean over all 22 targets")
