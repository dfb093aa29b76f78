"""`convert`: an adapter from PEFT's format to mlx-lm's, or back. It needs no base model."""

from __future__ import annotations

import argparse
import json

from .settings.flags import add_json_flag, folder

HELP = "an adapter to PEFT's format or mlx-lm's, to the bit"


def add_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("adapter")
    folder(group, "--adapter-path", "the adapter; its files say which format it is in", required=True)
    folder(group, "--save-path", "a new or empty folder for the same adapter", required=True)
    group.add_argument("--to", required=True, choices=("peft", "mlx-lm"), help="the format to write")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from ..files.adapters import convert_adapter

    source = convert_adapter(args.adapter_path, args.save_path, args.to)
    result = {"from": source, "to": args.to, "save_path": str(args.save_path)}
    sentence = f"{args.adapter_path}, in {source}'s format, is saved in {args.to}'s in {args.save_path}"
    print(json.dumps(result) if args.json else sentence)
