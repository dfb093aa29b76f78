"""What flags are made of, and the groups that several commands share. No MLX import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...config import TrainConfig
from ...text.turns import TARGETS

# mlx_impl/cli/settings/flags.py -> the project's root, where the sources lie beside their fixtures
GEOGRAPHY = Path(__file__).resolve().parents[3] / "fixtures" / "geography"
TRAIN_DEFAULTS = TrainConfig(iters=1)


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


def folder(group: Any, flag: str, help_text: str, required: bool = False) -> None:
    group.add_argument(flag, type=folder_path, metavar="DIR", required=required, help=help_text)


def folder_path(text: str) -> Path:
    if not text:  # Path("") is the folder that one is in
        raise argparse.ArgumentTypeError("must name a folder, and is empty")
    return Path(text)


def add_json_flag(group: Any) -> None:
    group.add_argument(
        "--json", action="store_true", help="print the result as one JSON object, nothing else (default: no)"
    )


def add_model_flag(group: Any) -> None:
    group.add_argument(
        "--model",
        metavar="PATH",
        help="a Hugging Face folder, a .gguf file or a name on the hub (default: SmolLM2-135M-Instruct)",
    )


def add_model_flags(group: Any) -> None:
    """The model, and how it is read and multiplied."""
    add_model_flag(group)
    switch(group, "--dequantize", False, "unpack MLX-quantized weights: faster on a CPU (default: no)")
    group.add_argument(
        "--blas",
        metavar="auto|off|PATH",
        help="Linux CPU: the library to multiply matrices with (default: $MLX_IMPL_BLAS, or auto)",
    )


def add_dtype_flag(group: Any) -> None:
    """Without choices, so that float16 is refused with the reason."""
    group.add_argument(
        "--dtype",
        metavar="float32|bfloat16",
        default="float32",
        help="the model's own type; bfloat16, for GPUs, takes half the memory (default: %(default)s)",
    )


def add_data_flags(group: Any) -> None:
    folder(group, "--data", "a folder with {train,valid,test}.jsonl (default: the geography questions)")
    group.add_argument(
        "--targets",
        choices=TARGETS,
        help="train on the last reply, on every reply, or on every token (default: completion)",
    )
    switch(group, "--mask-prompt", None, "--targets completion; --no-mask-prompt: all (default: yes)")
    number(group, "--max-seq-length", 2048, "cut longer examples to so many tokens")
    number(group, "--batch-size", TRAIN_DEFAULTS.batch_size, "examples a batch")


def targets(args: argparse.Namespace) -> str:
    """What is trained, from either spelling."""
    if args.targets is not None and args.mask_prompt is not None:
        raise ValueError("--mask-prompt is another spelling of --targets: give one of them")
    if args.targets is None:
        return "all" if args.mask_prompt is False else "completion"
    return str(args.targets)


def data_folder(path: Path | None) -> Path:
    if path is None and not GEOGRAPHY.is_dir():
        raise ValueError("the geography questions are not beside this package: give --data DIR")
    path = GEOGRAPHY if path is None else path
    if not path.is_dir():
        raise ValueError(f"--data must be a folder, got {path}")
    return path


def require_at_least(least: int, flag: str, value: int) -> None:
    if value < least:
        raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
