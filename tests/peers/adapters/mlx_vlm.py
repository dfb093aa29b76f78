"""An adapter for mlx-vlm's `Trainer`: its Llama, LoRA layers, loss and loop, on rows without images.

Nothing in it is patched. The task is the one that it makes for supervised fine-tuning; only its source of
batches is replaced. It makes no optimizer and has no schedule: the optimizer is that of its command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_vlm.trainer import Trainer, VLMTrainingArgs, get_peft_model
from mlx_vlm.trainer.common.utils import apply_optimizer_update
from mlx_vlm.trainer.vlm.sft.runtime import make_task

from tests.lora_ladder.protocol import Arrays, Batch, Dialect, LoRAConfig, ModelConfig, TrainConfig
from tests.peers.adapters.mlx_lm import FACTORS
from tests.peers.mlx_vlm_terms import (
    DECODER,
    lora_arguments,
    make_model,
    make_optimizer,
    named,
    their_batch,
    tree,
)

ROWS = [None]  # it asks for a data set that is not empty


class MlxVlmTrainer:
    dialect = Dialect(bias_correction=False, accumulation="mean of means")
    optimizer_from = "mlx.optimizers, made as mlx_vlm.train makes it"
    schedule_from = "none: mlx_vlm.train has no schedule"

    def __init__(
        self, spec: ModelConfig, weights: Arrays, lora: LoRAConfig | None, factors: Arrays | None
    ) -> None:
        self.model = make_model(spec)
        self.model.load_weights([(DECODER + name, mx.array(value)) for name, value in weights.items()])
        self.model.freeze()
        if lora is not None and factors is not None:
            with redirect_stdout(StringIO()):
                get_peft_model(self.model, **lora_arguments(lora))
            self.model.update(tree(factors))
        self.task = self.bound(VLMTrainingArgs(), ())

    def bound(self, arguments: VLMTrainingArgs, batches: Sequence[Batch]) -> Any:
        """mlx-vlm's task, which takes these batches in their order."""
        made = make_task(self.model, replace(arguments, train_on_completions=True))
        return replace(made, batches=lambda *_, **__: map(their_batch, batches), prepare_dataset=None)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return np.array(self.model.eval()(mx.array(tokens_BT)).logits)

    def loss(self, batch: Batch) -> tuple[float, int]:
        mean, metrics = self.task.loss(self.model.eval(), their_batch(batch))
        count = metrics["num_tokens"].item()
        return mean.item() * count, count

    def loss_of_logits(self, logits_BTV: np.ndarray, batch: Batch) -> tuple[float, int]:
        mean, metrics = self.task.loss(lambda *_, **__: mx.array(logits_BTV), their_batch(batch))
        count = metrics["num_tokens"].item()
        return mean.item() * count, count

    def gradients(self, batch: Batch) -> Arrays:
        gradient = nn.value_and_grad(self.model, self.task.loss)
        return named(gradient(self.model.eval(), their_batch(batch))[1])

    def evaluate(self, batches: Sequence[Batch]) -> float:
        arguments = VLMTrainingArgs(val_batches=-1)
        trainer = Trainer(self.model, arguments, task=self.bound(arguments, batches), eval_dataset=ROWS)
        return trainer.evaluate()["val_loss"]

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig, **more: bool) -> list[float]:
        """The mean nats per target that it reports of each window."""
        size = max(len(window) for window in windows)
        if any(len(window) != size for window in windows[:-1]):
            raise NotImplementedError("each window but the last must have as many micro-batches")
        batches = [batch for window in windows for batch in window]
        with TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            arguments = VLMTrainingArgs(
                iters=len(batches),
                steps_per_report=size,
                gradient_accumulation_steps=size,
                grad_checkpoint=training.grad_checkpoint,
                adapter_file=f"{folder}/adapters.safetensors",
                **more,
            )
            task = self.bound(arguments, batches)
            optimizer = make_optimizer(training)
            trainer = Trainer(
                self.model, arguments, task=task, train_dataset=ROWS, optimizer=optimizer, seed=training.seed
            )
            trainer.train()
        return [report["train_loss"] for report in trainer.log_history]

    def train_compiled(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return self.train(windows, training, compile=True)

    def train_checkpointed(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return self.train(windows, replace(training, grad_checkpoint=True))

    def apply_gradients(self, gradients: Sequence[Arrays], training: TrainConfig) -> None:
        optimizer = make_optimizer(training)
        for update in gradients:
            apply_optimizer_update(self.model, optimizer, tree(update))
            mx.eval(self.model, optimizer.state)

    def factors(self) -> Arrays:
        return named(self.model.trainable_parameters())

    def base(self) -> Arrays:
        every = named(self.model.parameters())
        return {name: value for name, value in every.items() if not name.endswith(FACTORS)}

    def merge(self) -> None:
        fused = [(name, m.fuse()) for name, m in self.model.named_modules() if hasattr(m, "fuse")]
        self.model.update_modules(tree_unflatten(fused))
