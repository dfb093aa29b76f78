"""mlx-vlm 0.7.10 accumulates the mean of the micro-batches' means, whatever their numbers of targets.

Two micro-batches of 2 and 20 targets are one update, by SGD. The model is a table of logits. Prints:

expected: 0% from the mean over all 22 targets
got: 34% from the mean over all 22 targets
"""

from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import SGD
from mlx_vlm.trainer import CoreTrainingArgs, Trainer, TrainingTask
from mlx_vlm.trainer.losses.cross_entropy import cross_entropy

targets = [mx.array([[1] * n + [2]])[:, 1:] for n in (2, 20)]


def loss(model, targets_BT):
    return cross_entropy(model(mx.ones_like(targets_BT)), targets_BT)


model = nn.Embedding(4, 4)
model.weight = start = mx.zeros((4, 4))
gradients = [nn.value_and_grad(model, loss)(model, batch)[1]["weight"] for batch in targets]
wanted = (2 * gradients[0] + 20 * gradients[1]) / 22
settings = CoreTrainingArgs(iters=2, gradient_accumulation_steps=2, adapter_file=mkdtemp() + "/a.safetensors")
task = TrainingTask(loss, lambda *_, **__: targets)
Trainer(model, settings, task=task, train_dataset=[0], optimizer=SGD(1.0)).train()
error = mx.linalg.norm(start - model.weight - wanted) / mx.linalg.norm(wanted)
print("expected: 0% from the mean over all 22 targets")
print(f"got: {error.item():.0%} from the mean over all 22 targets")
