"""The flags of `train` that describe the training. No MLX import."""

from __future__ import annotations

from typing import Any

from ...config import BATCHINGS
from .flags import TRAIN_DEFAULTS, add_number, add_switch

DEFAULT_EPOCHS = 5


def add_training_flags(group: Any) -> None:
    add_length_flags(group)
    add_optimizer_flags(group)
    add_switch(
        group,
        "--grad-checkpoint",
        TRAIN_DEFAULTS.grad_checkpoint,
        "gradient checkpointing: recompute activations in the backward pass to save memory (default: no)",
    )
    add_number(group, "--seed", TRAIN_DEFAULTS.seed, "seed of the initial adapter and of dropout")
    add_number(group, "--data-seed", None, "seed of the order of the examples", "the value of --seed")
    add_switch(group, "--compile", None, "compile the training step (default: only on a GPU)")
    add_switch(
        group,
        "--plain",
        False,
        "train, evaluate and ask questions without the faster code of mlx_impl/fast: the same numbers up to "
        "rounding, but other dropout masks; try it first when a run looks wrong (default: no)",
    )


def add_length_flags(group: Any) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--iters", type=int, metavar="N", help="number of optimizer updates (default: from --epochs)"
    )
    add_number(length, "--epochs", DEFAULT_EPOCHS, "passes over the training data")
    group.add_argument(
        "--batching",
        choices=BATCHINGS,
        default=TRAIN_DEFAULTS.batching,
        help="plain: in random order; grouped: batches of examples of similar length; packed: several "
        "examples per row; the last two need less padding (default: %(default)s)",
    )
    add_number(
        group,
        "--grad-accumulation-steps",
        TRAIN_DEFAULTS.grad_accumulation_steps,
        "micro-batches per update, each of --batch-size examples",
    )


def add_optimizer_flags(group: Any) -> None:
    defaults = TRAIN_DEFAULTS
    add_number(group, "--learning-rate", defaults.learning_rate, "peak learning rate")
    group.add_argument(
        "--lr-schedule",
        choices=("constant", "linear", "cosine"),
        default=defaults.lr_schedule,
        help="learning rate after the warmup; linear and cosine decay to 0 (default: %(default)s)",
    )
    add_number(
        group, "--warmup-steps", defaults.warmup_steps, "updates in which the learning rate rises from 0"
    )
    add_number(
        group,
        "--loraplus-lr-ratio",
        defaults.loraplus_lr_ratio,
        "LoRA+: learning rate of matrix B divided by that of matrix A",
    )
    group.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        default=defaults.optimizer,
        help="optimizer, as PyTorch defines it (default: %(default)s)",
    )
    add_number(group, "--weight-decay", defaults.weight_decay, "weight decay of the adapter")
    add_number(
        group, "--max-grad-norm", defaults.max_grad_norm, "clip gradients to this norm; 0: no clipping"
    )
