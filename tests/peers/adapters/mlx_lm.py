"""An adapter for mlx-lm's own trainer: its model, LoRA layers, loss, `train` and optimizers.

mlx-lm is not patched. `train` runs as its command line runs it, with an `iterate_batches` that hands over the
ladder's batches in order, padded as they are. An option that mlx-lm does not have raises NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.protocol import Arrays, Dialect
from tests.peers.mlx_lm_terms import (
    Reports,
    feed,
    learning_rate,
    lora_arguments,
    make_model,
    make_optimizer,
    their_batch,
)

FACTORS = ("lora_a", "lora_b", "magnitude")


def canonical(name: str) -> str:
    """The canonical name: mlx-lm has the base layer in `linear` and calls DoRA's magnitude `m`."""
    name = name.replace(".linear.", ".")
    return name.removesuffix(".m") + ".magnitude" if name.endswith(".m") else name


class MlxLmTrainer:
    # What mlx-lm does on purpose; undeclared.py takes back one at a time.
    dialect = Dialect(bias_correction=False, pad_targets=1, accumulation="mean of means")
    optimizer_from = "mlx.optimizers, made as mlx_lm.lora makes it"
    schedule_from = "mlx_lm.tuner.utils.build_schedule"

    def __init__(
        self, spec: ModelConfig, weights: Arrays, lora: LoRAConfig | None, factors: Arrays | None
    ) -> None:
        self.model = make_model(spec)
        self.model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
        self.model.freeze()
        if lora is not None and factors is not None:
            num_layers, config = lora_arguments(lora, factors, spec.num_hidden_layers)
            linear_to_lora_layers(self.model, num_layers, config, use_dora=lora.use_dora)
            self.model.update(self.tree(factors))
        self.optimizer: Any = None

    @staticmethod
    def tree(arrays: Arrays) -> Any:
        """A tree of arrays with mlx-lm's names."""
        renamed = {name.replace(".magnitude", ".m"): mx.array(value) for name, value in arrays.items()}
        return tree_unflatten(list(renamed.items()))

    @staticmethod
    def named(tree: Any) -> Arrays:
        """Arrays by their canonical names."""
        return {canonical(name): np.array(value) for name, value in tree_flatten(tree)}

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return np.array(self.model.eval()(mx.array(tokens_BT)))

    def loss(self, batch: Batch) -> tuple[float, int]:
        mean, count = trainer.default_loss(self.model.eval(), *their_batch(batch))
        return mean.item() * count.item(), count.item()

    def loss_of_logits(self, logits_BTV: np.ndarray, batch: Batch) -> tuple[float, int]:
        mean, count = trainer.default_loss(lambda _: mx.array(logits_BTV), *their_batch(batch))
        return mean.item() * count.item(), count.item()

    def evaluate(self, batches: Sequence[Batch]) -> float:
        return trainer.evaluate(self.model, [], 1, -1, iterate_batches=feed(batches))

    def gradients(self, batch: Batch) -> Arrays:
        gradient = nn.value_and_grad(self.model, trainer.default_loss)
        return self.named(gradient(self.model.eval(), *their_batch(batch))[1])

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        """The mean nats per target of each update, from mlx-lm's reports after every micro-batch."""
        batches = [batch for window in windows for batch in window]
        reports = Reports()
        mx.random.seed(training.seed)
        with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            arguments = trainer.TrainingArgs(
                iters=len(batches),
                steps_per_report=1,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
                grad_checkpoint=training.grad_checkpoint,
                grad_accumulation_steps=max(len(window) for window in windows),
            )
            self.optimizer = make_optimizer(training)
            trainer.train(
                self.model,
                self.optimizer,
                train_dataset=[],
                args=arguments,
                iterate_batches=feed(batches),
                training_callback=reports,
            )
        return reports.means([len(window) for window in windows])

    def train_checkpointed(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        block = type(self.model.layers[0])
        call = block.__call__  # mlx-lm replaces the class's method and does not restore it
        try:
            return self.train(windows, replace(training, grad_checkpoint=True))
        finally:
            block.__call__ = call

    def optimizer_names(self, training: TrainConfig) -> set[str]:
        optimizer = make_optimizer(training)
        optimizer.init(self.model.trainable_parameters())
        states = [name.rpartition(".")[0] for name, _ in tree_flatten(optimizer.state)]
        return {canonical(name) for name in states if name}

    def apply_gradients(self, gradients: Sequence[Arrays], training: TrainConfig) -> None:
        optimizer = make_optimizer(training)
        for update in gradients:
            optimizer.update(self.model, self.tree(update))
            mx.eval(self.model, optimizer.state)

    def learning_rates(self, training: TrainConfig) -> list[float]:
        rate = learning_rate(training)
        return [float(rate(mx.array(k)) if callable(rate) else rate) for k in range(training.iters)]

    def factors(self) -> Arrays:
        return self.named(self.model.trainable_parameters())

    def base(self) -> Arrays:
        every = self.named(self.model.parameters())
        return {name: value for name, value in every.items() if not name.endswith(FACTORS)}

    def merge(self) -> None:
        fused = [(name, m.fuse()) for name, m in self.model.named_modules() if hasattr(m, "fuse")]
        self.model.update_modules(tree_unflatten(fused))

    def load_mlx_lm(self, folder: Path) -> None:
        load_adapters(self.model, str(folder))

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        steps = generate_step(mx.array(prompt), self.model.eval(), max_tokens=num_tokens)
        return [int(token) for token, _ in steps]
