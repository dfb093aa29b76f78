"""Translate configurations and batches to mlx-vlm's; NotImplementedError where it has no equivalent."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_vlm.models import llama, qwen3

from mlx_impl.config import LoRAConfig, ModelConfig, TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.protocol import Arrays
from tests.peers.adapters.mlx_lm import canonical

DECODER = "language_model."


def tree(arrays: Arrays) -> Any:
    """A tree of arrays with mlx-vlm's names."""
    renamed = {DECODER + n.replace(".magnitude", ".m"): mx.array(value) for n, value in arrays.items()}
    return tree_unflatten(list(renamed.items()))


def named(arrays: Any) -> Arrays:
    """Arrays by their canonical names."""
    flat = tree_flatten(arrays)
    return {canonical(name.removeprefix(DECODER)): np.array(value) for name, value in flat}


def their_batch(batch: Batch) -> dict[str, mx.array]:
    """What its collator gives: tokens, and which of them are text and targets."""
    if batch.segment_BT is not None:
        raise NotImplementedError("mlx-vlm packs no rows")
    tokens_BS = np.concatenate([batch.inputs_BT[:, :1], batch.targets_BT], axis=1)
    completion_BS = np.pad(batch.mask_BT, ((0, 0), (1, 0)))
    given = {"input_ids": tokens_BS, "attention_mask": np.ones_like(tokens_BS)}
    return {name: mx.array(value) for name, value in (given | {"completion_mask": completion_BS}).items()}


def make_model(spec: ModelConfig) -> Any:
    settings = asdict(spec)
    if settings.pop("qkv_bias"):
        raise NotImplementedError("mlx-vlm's qwen2 has no head_dim")
    if settings.pop("sliding_window"):
        raise NotImplementedError("mlx-vlm's llama has a window only in layers that are listed")
    kind, name = (qwen3, "qwen3") if settings.pop("qk_norm") else (llama, "llama")
    return kind.Model(kind.ModelConfig(model_type=name, max_position_embeddings=2048, **settings))


def lora_arguments(lora: LoRAConfig) -> dict[str, Any]:
    """As `get_peft_model` takes them: the last part of a linear's name, or None for all but the head."""
    if lora.rank_pattern or lora.alpha_pattern:
        raise NotImplementedError("mlx-vlm has one rank and one scale for all")
    if lora.use_rslora or lora.num_layers != -1:
        raise NotImplementedError("mlx-vlm's get_peft_model has no rsLoRA and adapts every block")
    targets = lora.target_modules
    if targets == "all-linear":
        names = None
    elif isinstance(targets, str) or any("." in name for name in targets):
        raise NotImplementedError("mlx-vlm takes the last part of a name, or the whole name")
    else:
        names = list(targets)
    settings = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "use_dora": lora.use_dora}
    return {"linear_layers": names, "verbose": False, **settings}


def make_optimizer(training: TrainConfig) -> Any:
    """As mlx_vlm.train makes it: the class's defaults, the learning rate and AdamW's weight decay."""
    if training.lr_schedule != "constant" or training.warmup_steps:
        raise NotImplementedError("mlx_vlm.train has no schedule")
    if training.max_grad_norm or training.loraplus_lr_ratio != 1:
        raise NotImplementedError("mlx_vlm's Trainer has no clipping and no LoRA+")
    if training.optimizer == "adamw":
        return mlx.optimizers.AdamW(training.learning_rate, weight_decay=training.weight_decay)
    if training.weight_decay:
        raise NotImplementedError("mlx_vlm.train gives SGD no weight decay")
    return mlx.optimizers.SGD(training.learning_rate)
