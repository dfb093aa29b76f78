"""`convert`: an adapter from PEFT's format to mlx-lm's, or back. It needs no base model."""

from __future__ import annotations

import argparse
import json

from .settings.flags import add_folder, add_json_flag

HELP = "convert an adapter between PEFT's and mlx-lm's format"


def add_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("adapter")
    add_folder(group, "--adapter-path", "the adapter to convert; its files tell its format", required=True)
    add_folder(group, "--save-path", "folder for the converted adapter; new or empty", required=True)
    group.add_argument("--to", required=True, choices=("peft", "mlx-lm"), help="the format to write")
    add_json_flag(group)


def run(args: argparse.Namespace) -> None:
    from ..files.adapters import convert_adapter
    from .screen.console import make_console, show_status

    with show_status("converting the adapter", make_console(stderr=True)):
        source = convert_adapter(args.adapter_path, args.save_path, args.to)
    result = {"from": source, "to": args.to, "save_path": str(args.save_path)}
    sentence = f"{args.adapter_path}, converted from {source} to {args.to}, is saved in {args.save_path}"
    print(json.dumps(result) if args.json else sentence)
