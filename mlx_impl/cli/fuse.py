"""`fuse`: a Hugging Face folder of the model with the adapter in its weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .settings import flags
from .settings.flags import add_json_flag, folder

HELP = "a model folder with the adapter in its weights"


def add_flags(command: argparse.ArgumentParser) -> None:
    flags.add_model_flags(command.add_argument_group("model"))
    group = command.add_argument_group("adapter")
    folder(group, "--adapter-path", "the adapter, in PEFT's format or mlx-lm's", required=True)
    folder(group, "--save-path", "a new or empty folder for the fused model", required=True)
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from ..disk.places import require_apart, require_new_folder
    from ..files.checkpoint import load_model
    from ..files.fusing import LARGE_ERROR, fuse

    given = {"model": args.model, "adapter": args.adapter_path}  # before minutes of reading
    require_apart(args.save_path, {what: Path(path) for what, path in given.items() if path})
    require_new_folder(args.save_path)
    loaded = load_model(args.model)
    survival = fuse(loaded, args.adapter_path, args.save_path, args.dequantize)
    result = {
        "save_path": str(args.save_path),
        "survived": survival.survived,
        "error": survival.error,
    }
    if survival.error > LARGE_ERROR:
        advice = "fuse with --dequantize, or" if survival.is_quantized else "to have it whole,"
        print(
            f"warning: little of the update survived: the weights, rounded, miss it by {survival.error:.0%} "
            f"of its size; {advice} keep the adapter beside the model",
            file=sys.stderr,
        )
    sentence = (
        f"{loaded.name} with {args.adapter_path} in its weights is saved in {args.save_path}: "
        f"{survival.survived:.1%} of the update survived, with a rounding error of {survival.error:.2%} of it"
    )
    print(json.dumps(result) if args.json else sentence)
