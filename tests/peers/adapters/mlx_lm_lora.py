"""An adapter for mlx-lm-lora's SFT trainer: mlx-lm's model and LoRA layers, its own loss and loop.

Its `train_sft` asks MLX for `max_recommended_working_set_size`, which MLX has on a Mac only; here it is given
one. It takes the first batch of a new iterator for every step, so the batches come from one that goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm_lora.trainer import sft_trainer

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.protocol import Arrays
from tests.peers.adapters.mlx_lm import MlxLmTrainer
from tests.peers.mlx_lm_terms import Reports, feed, make_optimizer, their_batch

MAC = {"max_recommended_working_set_size": 0}


class MlxLmLoraTrainer(MlxLmTrainer):
    optimizer_from = "mlx.optimizers, made as mlx_lm_lora.train makes it"
    merge = load_mlx_lm = greedy = None  # type: ignore[assignment]  # mlx-lm's, not its own

    def loss(self, batch: Batch) -> tuple[float, int]:
        mean, count = sft_trainer.default_loss(self.model.eval(), *their_batch(batch))
        return mean.item() * count.item(), count.item()

    def loss_of_logits(self, logits_BTV: np.ndarray, batch: Batch) -> tuple[float, int]:
        mean, count = sft_trainer.default_loss(lambda _, cache: mx.array(logits_BTV), *their_batch(batch))
        return mean.item() * count.item(), count.item()

    def evaluate(self, batches: Sequence[Batch]) -> float:
        return sft_trainer.evaluate_sft(self.model, [], 1, -1, iterate_batches=feed(batches))[0]

    def gradients(self, batch: Batch) -> Arrays:
        gradient = nn.value_and_grad(self.model, sft_trainer.default_loss)
        return self.named(gradient(self.model.eval(), *their_batch(batch))[1])

    def train(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        """As the mlx-lm adapter's: its reports after every micro-batch are means too."""
        batches, reports = [batch for window in windows for batch in window], Reports()
        stream = map(their_batch, batches)
        self.optimizer = make_optimizer(training)
        mx.random.seed(training.seed)
        with (
            TemporaryDirectory() as folder,
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
            patch.object(mx, "device_info", lambda: MAC),
        ):
            arguments = sft_trainer.SFTTrainingArgs(
                iters=len(batches),
                steps_per_report=1,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
                grad_checkpoint=training.grad_checkpoint,
                gradient_accumulation_steps=max(len(window) for window in windows),
            )
            sft_trainer.train_sft(
                self.model,
                self.optimizer,
                [],
                args=arguments,
                iterate_batches=lambda **_: stream,
                training_callback=reports,
            )
        return reports.means([len(window) for window in windows])

    def train_checkpointed(self, windows: Sequence[Sequence[Batch]], training: TrainConfig) -> list[float]:
        block = type(self.model.layers[0])
        with patch.object(block, "__call__", block.__call__):  # put back what is replaced in the class
            return self.train(windows, replace(training, grad_checkpoint=True))
