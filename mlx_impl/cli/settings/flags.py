"""Flags that several commands share, and helpers to define flags. No MLX import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...config import TrainConfig
from ...text.columns import parse_columns
from ...text.rows import Reading
from ...text.shown import CHOICES
from ...text.template_choice import TemplateChoice, parse_arguments
from ...text.turns import TARGETS

# The default data: in an installed package beside its modules, in a clone in fixtures/.
PACKAGE = Path(__file__).resolve().parents[2]
INSTALLED, IN_CLONE = PACKAGE / "geography", PACKAGE.parent / "fixtures" / "geography"
GEOGRAPHY = INSTALLED if INSTALLED.is_dir() else IN_CLONE
TRAIN_DEFAULTS = TrainConfig(iters=1)


def add_number(
    group: Any, flag: str, default: float | None, help_text: str, default_text: str = "%(default)s"
) -> None:
    """A flag for a float where the default is one, else for an int."""
    kind = float if isinstance(default, float) else int
    group.add_argument(
        flag,
        type=kind,
        default=default,
        metavar="X" if kind is float else "N",
        help=f"{help_text} (default: {default_text})",
    )


def add_switch(group: Any, flag: str, default: bool | None, help_text: str) -> None:
    """A flag and its --no- form."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help_text)


def add_folder(group: Any, flag: str, help_text: str, required: bool = False) -> None:
    group.add_argument(flag, type=folder_path, metavar="DIR", required=required, help=help_text)


def folder_path(text: str) -> Path:
    if not text:  # Path("") would be the current folder
        raise argparse.ArgumentTypeError("must name a folder, got an empty text")
    return Path(text)


def add_json_flag(group: Any) -> None:
    group.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object and nothing else (default: no)",
    )


def add_model_flag(group: Any) -> None:
    group.add_argument(
        "--model",
        metavar="PATH",
        help="a Hugging Face model folder, a .gguf file or a model's name on the Hugging Face hub "
        "(default: SmolLM2-135M-Instruct)",
    )


def add_template_flags(group: Any) -> None:
    group.add_argument(
        "--chat-template",
        metavar="FILE|NAME",
        help="a file, or the name of one of the model's templates (default: the template that the adapter "
        "was trained with, else the model's own)",
    )
    group.add_argument(
        "--template-args",
        metavar="JSON",
        help="arguments of the chat template, such as '{\"enable_thinking\": false}' (default: none)",
    )


def template_of(args: argparse.Namespace) -> TemplateChoice:
    """The choice of --chat-template and --template-args."""
    given = args.template_args
    return TemplateChoice(args.chat_template, {} if given is None else parse_arguments(given))


def add_model_flags(
    group: Any, dequantize: str = "unpack MLX-quantized weights: faster on a CPU, but takes more memory"
) -> None:
    """--model, --dequantize with this help text, and --blas: for commands that read the weights."""
    add_model_flag(group)
    add_switch(group, "--dequantize", False, f"{dequantize} (default: no)")
    group.add_argument(
        "--blas",
        metavar="auto|off|PATH",
        help="CPU on Linux: the BLAS library that multiplies matrices (default: $MLX_IMPL_BLAS, or auto)",
    )


def add_dtype_flag(group: Any) -> None:
    """No argparse choices: float16 is refused later, in a sentence that says why."""
    group.add_argument(
        "--dtype",
        metavar="float32|bfloat16",
        default="float32",
        help="data type of the model's weights; bfloat16, for GPUs, takes half the memory "
        "(default: %(default)s)",
    )


def add_data_flags(group: Any) -> None:
    add_folder(
        group,
        "--data",
        "folder with train.jsonl, and valid.jsonl and test.jsonl if there are any; or .json, .jsonl.gz, "
        ".parquet (default: questions about forty capitals, which come with the package)",
    )
    group.add_argument(
        "--columns",
        metavar="NAME=COLUMN,...",
        help="read NAME from a column with another name: prompt=question,completion=answer (default: columns "
        "are named messages, conversations, prompt, completion, instruction, input, output, text, ...)",
    )
    add_switch(
        group,
        "--skip-bad",
        False,
        "leave out rows that cannot be read, and say how many and which (default: no)",
    )
    add_marking_flags(group)
    add_number(group, "--max-seq-length", 2048, "truncate longer examples to N tokens")
    add_number(group, "--batch-size", TRAIN_DEFAULTS.batch_size, "examples per batch")


def add_marking_flags(group: Any) -> None:
    """Which tokens are targets."""
    group.add_argument(
        "--targets",
        choices=TARGETS,
        help="tokens that count for the loss: completion (the last reply), assistant (every reply) or all "
        "(default: completion)",
    )
    add_switch(
        group,
        "--mask-prompt",
        None,
        "the same as --targets completion, and --no-mask-prompt as --targets all (default: yes)",
    )
    group.add_argument(
        "--reasoning",
        choices=CHOICES,
        default=CHOICES[0],
        help="where the chat template drops the reasoning of a reply to be trained: require (that is an "
        "error), inline (write it into the reply, between <think> and </think>) or template (train without "
        "it) (default: %(default)s)",
    )


def targets_of(args: argparse.Namespace) -> str:
    """The value of --targets, also where it was given as --mask-prompt."""
    if args.targets is not None and args.mask_prompt is not None:
        raise ValueError("--mask-prompt is another name for --targets: give only one of them")
    if args.targets is None:
        return "all" if args.mask_prompt is False else "completion"
    return str(args.targets)


def encoding_of(args: argparse.Namespace) -> tuple[str, int, str, bool]:
    """How the flags say that rows become examples: `encode_file`'s arguments from `targets` on."""
    return targets_of(args), args.max_seq_length, args.reasoning, args.skip_bad


def reading_of(args: argparse.Namespace) -> Reading:
    """How the flags say that data files are read."""
    columns = {} if args.columns is None else parse_columns(args.columns)
    return Reading(columns, args.skip_bad, args.reasoning == "inline")


def data_folder(path: Path | None) -> Path:
    if path is None and not GEOGRAPHY.is_dir():
        raise ValueError("this installation has no default data: give --data DIR")
    path = GEOGRAPHY if path is None else path
    if not path.is_dir():
        raise ValueError(f"--data must be a folder, got {path}")
    return path


def require_at_least(minimum: int, flag: str, value: int) -> None:
    if value < minimum:
        raise ValueError(f"--{flag.replace('_', '-')} must be at least {minimum}, got {value}")
