"""The command line: names as mlx-lm's users know them, grouped and explained. No MLX import."""

from __future__ import annotations

import argparse
from pathlib import Path

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


def add_data_arguments(group: argparse._ArgumentGroup, default_length: int = 2048) -> None:
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a folder with {train,valid,test}.jsonl (default: the geography questions)",
    )
    group.add_argument(
        "--mask-prompt",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train on the last reply only, not on what comes before it (default: yes)",
    )
    group.add_argument(
        "--max-seq-length",
        type=int,
        default=default_length,
        metavar="N",
        help="cut longer examples (default: %(default)s tokens)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=TRAIN_DEFAULTS.batch_size,
        metavar="N",
        help="examples a step (default: %(default)s)",
    )


def add_train_arguments(command: argparse.ArgumentParser) -> None:
    add_model_arguments(command.add_argument_group("model"))
    add_data_arguments(command.add_argument_group("data"))
    add_lora_arguments(command.add_argument_group("adapter"))
    group = command.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--iters", type=int, metavar="N", help="optimizer updates")
    length.add_argument(
        "--epochs",
        type=int,
        default=DEFAULT_EPOCHS,
        metavar="N",
        help="passes over the training file (default: %(default)s)",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        default=TRAIN_DEFAULTS.learning_rate,
        metavar="X",
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        default=TRAIN_DEFAULTS.optimizer,
        help="as PyTorch defines them (default: %(default)s)",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        default=TRAIN_DEFAULTS.weight_decay,
        metavar="X",
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=TRAIN_DEFAULTS.seed,
        metavar="N",
        help="of the initial adapter, the order of the examples and dropout (default: %(default)s)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the training step (default: on a GPU)",
    )
    add_report_arguments(command.add_argument_group("report"))


def add_lora_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapter-path",
        type=Path,
        default=Path("adapters"),
        metavar="DIR",
        help="the run's folder: adapter, metrics, report (default: %(default)s)",
    )
    group.add_argument(
        "--init-adapter",
        type=Path,
        metavar="DIR",
        help="start from this adapter; rank, alpha, targets and layers come with it",
    )
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
    group.add_argument(
        "--target-modules",
        metavar="NAMES",
        help=f"which linears, separated by commas (default: {','.join(BLOCK_LINEARS)})",
    )
    group.add_argument(
        "--num-layers", type=int, metavar="N", help="adapt the last N layers (default: -1, all)"
    )


def add_report_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--steps-per-eval",
        type=int,
        default=25,
        metavar="N",
        help="steps between validations (default: %(default)s)",
    )
    group.add_argument(
        "--num-questions",
        type=int,
        metavar="N",
        help="ask at most N questions of each file before and after (default: all)",
    )
    group.add_argument(
        "--json", action="store_true", help="print the report as one JSON object, nothing else"
    )


def add_evaluate_arguments(command: argparse.ArgumentParser) -> None:
    add_model_arguments(command.add_argument_group("model"))
    add_data_arguments(command.add_argument_group("data"))
    group = command.add_argument_group("evaluation")
    group.add_argument("--adapter-path", type=Path, metavar="DIR", help="(default: no adapter)")
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def add_generate_arguments(command: argparse.ArgumentParser) -> None:
    add_model_arguments(command.add_argument_group("model"))
    group = command.add_argument_group("generation")
    group.add_argument("--adapter-path", type=Path, metavar="DIR", help="(default: no adapter)")
    group.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
    group.add_argument("--max-tokens", type=int, default=100, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the most likely token, 1 draws from the model (default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
