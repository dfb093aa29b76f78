"""`fuse`: the model with the adapter added to its weights, as a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .settings import flags
from .settings.flags import add_folder, add_json_flag

if TYPE_CHECKING:
    from ..files.fusing import Survival

HELP = "merge an adapter into the model's weights"


def add_flags(command: argparse.ArgumentParser) -> None:
    flags.add_model_flags(
        command.add_argument_group("model"),
        dequantize="write MLX-quantized weights unquantized, which keep more of the update",
    )
    group = command.add_argument_group("adapter")
    add_folder(group, "--adapter-path", "the adapter, in PEFT's format or mlx-lm's", required=True)
    add_folder(group, "--save-path", "folder for the fused model; new or empty", required=True)
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from ..disk.output_folder import require_new_folder, require_no_overlap
    from ..files.checkpoint import load_model
    from ..files.fusing import LARGE_ERROR, fuse
    from .screen.console import make_console, show_status

    inputs = {"model": args.model, "adapter": args.adapter_path}
    # fuse() checks this too, but only after minutes of reading the model.
    require_no_overlap(args.save_path, {what: Path(path) for what, path in inputs.items() if path})
    require_new_folder(args.save_path)
    with show_status("reading the model", make_console(stderr=True)) as status:
        loaded = load_model(args.model)
        status.update(f"fusing {loaded.name} and writing it")
        survival = fuse(loaded, args.adapter_path, args.save_path, args.dequantize)
    result = {
        "save_path": str(args.save_path),
        "survived": survival.survived,
        "error": survival.error,
    }
    if survival.error > LARGE_ERROR:
        print_warning(survival)
    sentence = (
        f"{loaded.name} with {args.adapter_path} in its weights is saved in {args.save_path}: "
        f"{survival.survived:.1%} of the update survived; its rounding error is {survival.error:.2%} of it"
    )
    print(json.dumps(result) if args.json else sentence)


def print_warning(survival: Survival) -> None:
    remedy = "fuse with --dequantize, or" if survival.is_quantized else "to have it whole,"
    print(
        f"warning: little of the update survived: rounding the fused weights changed it by "
        f"{survival.error:.0%} of its size; {remedy} keep the adapter beside the model",
        file=sys.stderr,
    )
