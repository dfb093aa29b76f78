"""The trainer as a program calls it: model and configurations in, step records out, the adapter in place.

trainer = LoRATrainer(model, LoRAConfig(rank=8), TrainConfig(iters=60))
for record in trainer.fit(examples):
    print(record.step, record.loss_nats)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from .config import LoRAConfig, TrainConfig
from .data import Example, evaluation_batches, training_batches
from .lora import add_lora, lora_parameters, select_linears
from .model import CausalLM
from .optim import make_optimizer
from .train import StepRecord, evaluate, train


class LoRATrainer:
    """LoRA factors in place, everything else frozen, an optimizer ready.

    A model that carries an adapter already keeps it and trains on (`lora` must then be None).
    `compiled=None` compiles on a GPU; on a CPU each new shape would cost seconds for a few percent.
    Raises ValueError when anything but LoRA factors would be trained.
    """

    def __init__(
        self,
        model: CausalLM,
        lora: LoRAConfig | None,
        training: TrainConfig,
        compiled: bool | None = None,
    ) -> None:
        mx.random.seed(training.seed)
        if lora is not None:
            add_lora(model, select_linears(model, lora), lora)
        lora_parameters(model)  # raises if anything else is trainable
        self.model, self.training = model, training
        self.optimizer = make_optimizer(training)
        self.compiled = mx.default_device() == mx.gpu if compiled is None else compiled

    def fit(self, examples: Sequence[Example]) -> Iterator[StepRecord]:
        """Train for `training.iters` updates; stop reading the iterator to stop earlier."""
        batches = training_batches(
            examples, self.training.batch_size, self.training.iters, self.training.seed
        )
        return train(self.model, self.optimizer, batches, self.compiled)

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Nats per target over all the examples, dropout off."""
        return evaluate(self.model, evaluation_batches(examples, self.training.batch_size))[0]
