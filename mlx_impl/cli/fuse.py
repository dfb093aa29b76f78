"""`fuse`: the model with the adapter added to its weights, as a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import flags
from .settings.flags import add_folder, add_json_flag

if TYPE_CHECKING:
    from rich.console import Console

    from ..files.checkpoint import LoadedModel
    from ..files.fusing import Survival

HELP = "merge an adapter into the model's weights"


def add_flags(command: argparse.ArgumentParser) -> None:
    flags.add_model_flags(
        command.add_argument_group("model"),
        dequantize="write MLX-quantized weights unquantized, which keep more of the update",
    )
    group = command.add_argument_group("adapter")
    add_folder(group, "--adapter-path", "the adapter, in PEFT's format or mlx-lm's", required=True)
    written = group.add_mutually_exclusive_group(required=True)
    add_folder(written, "--save-path", "folder for the fused model; new or empty (default: none)")
    written.add_argument(
        "--gguf",
        type=Path,
        metavar="FILE",
        help="a new GGUF file for the fused model, as llama.cpp and Ollama read it (default: none)",
    )
    group.add_argument(
        "--gguf-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="data type of its matrices (default: the base's; float32 where that is a GGUF file)",
    )
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from ..files.checkpoint import load_model
    from ..files.fusing import LARGE_ERROR
    from .screen.console import make_console, show_status

    require_free_output(args)
    console = make_console(stderr=True)
    with show_status("reading the model", console):
        loaded = load_model(args.model)
    survival = write(loaded, args, console)
    saved = args.save_path or args.gguf
    result = {
        "save_path": str(saved),
        "survived": survival.survived,
        "error": survival.error,
    }
    if survival.error > LARGE_ERROR:
        print_warning(survival)
    sentence = (
        f"{loaded.name} with {args.adapter_path} in its weights is saved in {saved}: "
        f"{survival.survived:.1%} of the update survived; its rounding error is {survival.error:.2%} of it"
    )
    print(json.dumps(result) if args.json else sentence)


def require_free_output(args: argparse.Namespace) -> None:
    """ValueError where something is in the way. `fuse` checks it too, but only after the model is read."""
    from ..disk.output_folder import require_new_folder, require_no_overlap
    from ..files.fusing_gguf import require_new_gguf

    if args.gguf is not None:
        require_new_gguf(args.gguf)
        return
    if args.gguf_dtype is not None:
        raise ValueError("--gguf-dtype is for --gguf FILE; a folder keeps the types of the base")
    inputs = {"model": args.model, "adapter": args.adapter_path}
    require_no_overlap(args.save_path, {what: Path(path) for what, path in inputs.items() if path})
    require_new_folder(args.save_path)


def write(loaded: LoadedModel, args: argparse.Namespace, console: Console) -> Survival:
    from ..files.fusing import fuse
    from ..files.fusing_gguf import fuse_to_gguf
    from .screen.console import show_progress

    def progress(tensors: Iterable[Any], num_tensors: int) -> Iterable[Any]:
        return show_progress(tensors, num_tensors, "writing tensors", console)

    if args.gguf is not None:
        return fuse_to_gguf(loaded, args.adapter_path, args.gguf, args.dequantize, args.gguf_dtype, progress)
    return fuse(loaded, args.adapter_path, args.save_path, args.dequantize, progress)


def print_warning(survival: Survival) -> None:
    remedy = "fuse with --dequantize, or" if survival.is_quantized else "to have it whole,"
    print(
        f"warning: little of the update survived: rounding the fused weights changed it by "
        f"{survival.error:.0%} of its size; {remedy} keep the adapter beside the model",
        file=sys.stderr,
    )
