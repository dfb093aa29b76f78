"""unsloth-zoo 2026.10.9 gives DoRA's magnitude the learning rate of A under LoRA+, on MLX; PEFT gives it B's.

A model in which the magnitude and a row of B have the same gradient; SGD, ratio 4. Prints:

expected: the magnitude moved by 1.00 of B
got: the magnitude moved by 0.25 of B
"""

import os
from tempfile import mkdtemp

os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")

import mlx.core as mx
import mlx.nn as nn
from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_b, self.m = mx.zeros((4, 4)), mx.zeros(4)

    def __call__(self, tokens):
        return self.lora_b[tokens] + self.m


model, tokens = Model(), mx.array([[1, 1, 1, 2]])
settings = {"optim": "sgd", "learning_rate": 0.125, "lora_plus_ratio": 4.0, "max_grad_norm": 0.0}
settings |= {"max_grad_leaf_norm": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "max_steps": 1}
settings |= {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 1, "use_cce": False}
trainer = MLXTrainer(model, None, None, args=MLXTrainingConfig(output_dir=mkdtemp(), **settings))
trainer._batches = [(tokens, mx.array([[0, 4]]), tokens)]
trainer.save_model = lambda *_, **__: None
trainer.train()
print("expected: the magnitude moved by 1.00 of B")
print(f"got: the magnitude moved by {(model.m[2] / model.lora_b[1, 2]).item():.2f} of B")
