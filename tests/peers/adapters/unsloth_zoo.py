"""An adapter for Unsloth's MLX trainer: mlx-lm's model and LoRA layers, its own loss, loop and schedule.

It is given ready batches with labels; only its last save is left out. On Linux it imports only with
UNSLOTH_ZOO_DISABLE_GPU_INIT=1, because it looks for a GPU otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.protocol import Arrays, Dialect
from tests.peers.adapters.mlx_lm import MlxLmTrainer, canonical

os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")
with redirect_stdout(StringIO()):
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig
    from unsloth_zoo.mlx.utils import make_baseline_loss_fn

IGNORED = -100


def with_labels(batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """The tokens, for each row its range of positions, and the labels, not shifted."""
    tokens_BS = np.concatenate([batch.inputs_BT[:, :1], batch.targets_BT], axis=1)
    labels_BT = np.where(batch.mask_BT, batch.targets_BT, IGNORED)
    labels_BS = np.pad(labels_BT, ((0, 0), (1, 0)), constant_values=IGNORED)
    lengths_B2 = np.tile([0, tokens_BS.shape[1]], (len(tokens_BS), 1))
    return mx.array(tokens_BS), mx.array(lengths_B2), mx.array(labels_BS)


def settings(training: TrainConfig, micro_batches: int, folder: str) -> Any:
    """Every option of the run by Unsloth's name of it; its cap on each tensor's gradient is off."""
    kind = training.lr_schedule
    if kind == "constant" and training.warmup_steps:
        kind = "constant_with_warmup"
    return MLXTrainingConfig(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=micro_batches,
        max_steps=training.iters,
        warmup_steps=training.warmup_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=kind,
        optim=training.optimizer,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        max_grad_leaf_norm=0.0,
        lora_plus_ratio=0.0 if training.loraplus_lr_ratio == 1 else training.loraplus_lr_ratio,
        gradient_checkpointing=training.grad_checkpoint,
        seed=training.seed,
        output_dir=folder,
        use_cce=False,
        disable_memory_limits=True,
    )


class UnslothTrainer(MlxLmTrainer):
    dialect = Dialect(equal="within one rounding")  # clipping is another way to compute the same
    optimizer_from = "unsloth_zoo.mlx.trainer"
    schedule_from = "unsloth_zoo.mlx.trainer"
    # Not its own, or without a door.
    merge = load_mlx_lm = greedy = evaluate = apply_gradients = None  # type: ignore[assignment]

    def loss(self, batch: Batch) -> tuple[float, int]:
        mean, count = make_baseline_loss_fn()(self.model.eval(), *with_labels(batch))
        return mean.item() * count.item(), int(count.item())

    def loss_of_logits(self, logits_BTV: np.ndarray, batch: Batch) -> tuple[float, int]:
        mean, count = make_baseline_loss_fn()(lambda _: mx.array(logits_BTV), *with_labels(batch))
        return mean.item() * count.item(), int(count.item())

    def gradients(self, batch: Batch) -> Arrays:
        gradient = nn.value_and_grad(self.model, make_baseline_loss_fn())
        return self.named(gradient(self.model.eval(), *with_labels(batch))[1])

    def trainer(self, training: TrainConfig, micro_batches: int = 1, folder: str = ".") -> Any:
        with redirect_stdout(StringIO()):
            return MLXTrainer(self.model, None, None, args=settings(training, micro_batches, folder))

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        """The losses that it logs after each update; it stops after the last window."""
        if len({len(window) for window in windows}) > 1:
            raise NotImplementedError("the adapter cannot give windows of unequal size")
        losses: list[float] = []

        def note(step: int, total: int, loss: float, *_: Any, **__: Any) -> None:
            losses.append(loss)
            trainer.stop_requested = step >= len(windows)

        with TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            trainer = self.trainer(training, len(windows[0]), folder)
            trainer._batches = [with_labels(batch) for window in windows for batch in window]
            trainer.add_step_callback(note)
            trainer.save_model = lambda *_, **__: None  # it would save a tokenizer, and there is none
            mx.random.seed(training.seed)  # it seeds the order of the data alone
            trainer.train()
        return losses

    def train_checkpointed(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        return self.train(windows, replace(training, grad_checkpoint=True))

    def learning_rates(self, training: TrainConfig) -> list[float]:
        trainer = self.trainer(training)
        schedule = trainer._build_schedule(training.iters)
        return [float(trainer._schedule_value(schedule, update)) for update in range(training.iters)]

    def optimizer_names(self, training: TrainConfig) -> set[str]:
        optimizer = self.trainer(training)._build_optimizer(training.iters)
        optimizer.init(self.model.trainable_parameters())
        states = [name.rpartition(".")[0] for name, _ in tree_flatten(optimizer.state)]
        return {canonical(name) for name in states if name}
