"""The command line: names as mlx-lm's and PEFT's users know them, grouped and explained. No MLX import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .config import BLOCK_LINEARS, LoRAConfig, TrainConfig

DEFAULT_EPOCHS = 5
# Of the flags that --init-adapter settles, and so start as None.
LORA_DEFAULTS = LoRAConfig()
TRAIN_DEFAULTS = TrainConfig(iters=1)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_impl",
        description="LoRA fine-tuning in pure MLX, checked against PyTorch.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text, add_arguments in (
        ("train", "fine-tune a model and show what it learned", add_train_arguments),
        ("evaluate", "the loss over the test file", add_evaluate_arguments),
        ("generate", "the answer to a prompt", add_generate_arguments),
    ):
        command = commands.add_parser(
            name, help=help_text, description=help_text.capitalize() + ".", allow_abbrev=False
        )
        add_arguments(command)
    return parser


def number(group: Any, flag: str, default: float | None, help_text: str, shown: str = "%(default)s") -> None:
    """A flag for a number of the default's kind, an int where there is none."""
    kind = float if isinstance(default, float) else int
    group.add_argument(
        flag,
        type=kind,
        default=default,
        metavar="X" if kind is float else "N",
        help=f"{help_text} (default: {shown})",
    )


def switch(group: Any, flag: str, default: bool | None, help_text: str) -> None:
    """A flag that its --no- form turns off."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help_text)


def folder(group: Any, flag: str, help_text: str) -> None:
    group.add_argument(flag, type=Path, metavar="DIR", help=help_text)


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a Hugging Face folder or a .gguf file (default: SmolLM2-135M-Instruct)",
    )
    group.add_argument(
        "--blas",
        metavar="auto|off|PATH",
        help="Linux CPU: the library to multiply matrices with (default: $MLX_IMPL_BLAS, or auto)",
    )


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    folder(group, "--data", "a folder with {train,valid,test}.jsonl (default: the geography questions)")
    switch(
        group,
        "--mask-prompt",
        True,
        "train on the last reply only, not on what comes before it (default: yes)",
    )
    number(group, "--max-seq-length", 2048, "cut longer examples to so many tokens")
    number(group, "--batch-size", TRAIN_DEFAULTS.batch_size, "examples a batch")


def add_train_arguments(command: argparse.ArgumentParser) -> None:
    add_model_arguments(command.add_argument_group("model"))
    add_data_arguments(command.add_argument_group("data"))
    add_lora_arguments(command.add_argument_group("adapter"))
    add_step_arguments(command.add_argument_group("training"))
    add_run_arguments(command.add_argument_group("run"))


def add_lora_arguments(group: argparse._ArgumentGroup) -> None:
    folder(group, "--init-adapter", "start from this adapter; all settings of this group come with it")
    group.add_argument("--rank", type=int, metavar="R", help=f"of the update (default: {LORA_DEFAULTS.rank})")
    group.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help=f"the update is scaled by alpha / rank (default: {LORA_DEFAULTS.alpha:g})",
    )
    group.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help=f"on the adapter's input, while training (default: {LORA_DEFAULTS.dropout:g})",
    )
    targets = group.add_mutually_exclusive_group()
    targets.add_argument(
        "--target-modules",
        metavar="NAMES",
        help=f"which linears: ends of their names, separated by commas, or all-linear "
        f"(default: {','.join(BLOCK_LINEARS)})",
    )
    targets.add_argument("--target-regex", metavar="EXPR", help="those whose whole name matches")
    group.add_argument(
        "--num-layers", type=int, metavar="N", help="adapt the last N layers (default: -1, all)"
    )
    for what in ("rank", "alpha"):
        group.add_argument(
            f"--{what}-pattern", metavar="NAME=N,...", help=f"another {what} for linears whose names end so"
        )
    switch(group, "--use-rslora", None, "scale by alpha / sqrt(rank) (default: no)")
    switch(group, "--use-dora", None, "DoRA: train direction and length of each row apart (default: no)")


def add_step_arguments(group: argparse._ArgumentGroup) -> None:
    defaults = TRAIN_DEFAULTS
    length = group.add_mutually_exclusive_group()
    length.add_argument("--iters", type=int, metavar="N", help="optimizer updates")
    number(length, "--epochs", DEFAULT_EPOCHS, "passes over the training file")
    number(group, "--grad-accumulation-steps", defaults.grad_accumulation_steps, "batches an update")
    number(group, "--learning-rate", defaults.learning_rate, "at its highest")
    group.add_argument(
        "--lr-schedule",
        choices=("constant", "linear", "cosine"),
        default=defaults.lr_schedule,
        help="after the warmup: stay, or go down to 0 (default: %(default)s)",
    )
    number(group, "--warmup-steps", defaults.warmup_steps, "updates in which the learning rate rises from 0")
    number(group, "--loraplus-lr-ratio", defaults.loraplus_lr_ratio, "LoRA+: B learns so many times as fast")
    group.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        default=defaults.optimizer,
        help="as PyTorch defines them (default: %(default)s)",
    )
    number(group, "--weight-decay", defaults.weight_decay, "of the adapter")
    number(group, "--max-grad-norm", defaults.max_grad_norm, "clip the gradient to this norm; 0: never")
    switch(
        group,
        "--grad-checkpoint",
        defaults.grad_checkpoint,
        "compute activations twice instead of keeping them: less memory (default: no)",
    )
    number(group, "--seed", defaults.seed, "of the initial adapter and of dropout")
    number(group, "--data-seed", None, "of the order of the examples", "the --seed")
    switch(group, "--compile", None, "compile the training step (default: on a GPU)")


def add_run_arguments(group: argparse._ArgumentGroup) -> None:
    folder(group, "--adapter-path", "the run's folder: adapter, metrics, report (default: adapters)")
    folder(group, "--resume", "go on with the run in this folder, to the bit as if it had not been stopped")
    number(group, "--save-every", 25, "steps between savings of adapter and training state")
    number(group, "--steps-per-eval", 25, "steps between validations")
    number(group, "--patience", 0, "stop after so many validations without a better loss; 0: never")
    number(group, "--num-questions", None, "ask at most N questions of each file before and after", "all")
    group.add_argument(
        "--json", action="store_true", help="print the report as one JSON object, nothing else"
    )


def add_evaluate_arguments(command: argparse.ArgumentParser) -> None:
    add_model_arguments(command.add_argument_group("model"))
    add_data_arguments(command.add_argument_group("data"))
    group = command.add_argument_group("evaluation")
    folder(group, "--adapter-path", "with this adapter (default: none)")
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def add_generate_arguments(command: argparse.ArgumentParser) -> None:
    add_model_arguments(command.add_argument_group("model"))
    group = command.add_argument_group("generation")
    folder(group, "--adapter-path", "with this adapter (default: none)")
    group.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
    number(group, "--max-tokens", 100, "of the answer")
    number(group, "--temperature", 0.0, "0 takes the most likely token, 1 draws from the model")
    number(group, "--seed", 0, "of the draw")
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
