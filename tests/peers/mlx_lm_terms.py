"""Translate configurations and batches to mlx-lm's; NotImplementedError where it has no equivalent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
from mlx_lm.models import llama, qwen3
from mlx_lm.tuner.utils import build_schedule

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.protocol import Arrays


class Reports:
    """A callback for mlx-lm that records the mean loss and the number of targets of each micro-batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.totals: list[int] = [0]

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        self.losses.append(report["train_loss"])
        self.totals.append(report["trained_tokens"])

    def means(self, sizes: Sequence[int]) -> list[float]:
        """Nats per target of each window; `sizes` are the numbers of micro-batches in the windows."""
        ends, counts = np.cumsum([0, *sizes]), np.diff(self.totals)
        sums = np.concatenate([[0.0], np.cumsum(np.array(self.losses) * counts)])
        with np.errstate(invalid="ignore"):  # NaN where there are no targets
            return (np.diff(sums[ends]) / np.diff(np.array(self.totals)[ends])).tolist()


def make_model(spec: ModelConfig) -> Any:
    settings = asdict(spec)
    if settings.pop("qkv_bias"):
        raise NotImplementedError("mlx-lm's qwen2 has no head_dim")
    if settings.pop("sliding_window"):
        raise NotImplementedError("mlx-lm's llama has a window only in layers that are listed")
    kind = qwen3 if settings.pop("qk_norm") else llama
    return kind.Model(kind.ModelArgs(model_type="ladder", max_position_embeddings=2048, **settings))


def lora_arguments(lora: LoRAConfig, factors: Arrays, depth: int) -> tuple[int, dict[str, Any]]:
    """How many of the last blocks are adapted; rank, scale, dropout and the linears of each block."""
    if lora.rank_pattern or lora.alpha_pattern:
        raise NotImplementedError("mlx-lm has one rank and one scale for all")
    linears = {name.split(".", 3)[3].rpartition(".")[0]: None for name in factors}
    blocks = {int(name.split(".")[2]) for name in factors}
    if len(factors) != len(blocks) * len(linears) * (3 if lora.use_dora else 2) or max(blocks) < depth - 1:
        raise NotImplementedError("mlx-lm adapts the same linears in each of the last blocks")
    scale = lora.alpha / (lora.rank**0.5 if lora.use_rslora else lora.rank)
    config = {"rank": lora.rank, "scale": scale, "dropout": lora.dropout, "keys": list(linears)}
    return len(blocks), config


def learning_rate(training: TrainConfig) -> Any:
    """The schedule as mlx-lm configures it; constant after a warmup is linear from peak to peak."""
    peak, left = training.learning_rate, max(1, training.iters - training.warmup_steps)
    if training.lr_schedule == "constant" and not training.warmup_steps:
        return peak
    names = {"constant": "linear_schedule", "linear": "linear_schedule", "cosine": "cosine_decay"}
    arguments = {"constant": [peak, peak, left], "linear": [peak, 0.0, left], "cosine": [peak, left]}
    kind = training.lr_schedule
    return build_schedule(
        {"name": names[kind], "arguments": arguments[kind], "warmup": training.warmup_steps}
    )


def make_optimizer(training: TrainConfig) -> Any:
    """The optimizer as mlx-lm's command line makes it: the class's defaults and the configured values."""
    if training.max_grad_norm:
        raise NotImplementedError("mlx-lm does not clip")
    if training.loraplus_lr_ratio != 1:
        raise NotImplementedError("mlx-lm has no LoRA+")
    kind = {"adamw": mlx.optimizers.AdamW, "sgd": mlx.optimizers.SGD}[training.optimizer]
    return kind(learning_rate=learning_rate(training), weight_decay=training.weight_decay)


def feed(batches: Sequence[Batch]) -> Any:
    """A replacement for mlx-lm's iterate_batches that yields these batches."""
    return lambda **_: map(their_batch, batches)


def their_batch(batch: Batch) -> tuple[mx.array, mx.array]:
    """The tokens, and for each row the length of its prompt and of the whole."""
    tokens_BS = np.concatenate([batch.inputs_BT[:, :1], batch.targets_BT], axis=1)
    return mx.array(tokens_BS), mx.array([row_lengths(mask_T) for mask_T in batch.mask_BT])


def row_lengths(mask_T: np.ndarray) -> tuple[int, int]:
    """The length of the prompt and of the whole; a row without targets is all prompt."""
    places = np.flatnonzero(mask_T)
    if not len(places):
        return len(mask_T) + 2, len(mask_T) + 1
    if len(places) != places[-1] - places[0] + 1:
        raise NotImplementedError("mlx-lm's targets are one contiguous run of tokens per row")
    return int(places[0]) + 1, int(places[-1]) + 2
