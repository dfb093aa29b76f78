"""The parser over all commands; each command's module brings its own flags. No MLX import."""

from __future__ import annotations

import argparse
from types import ModuleType

from . import evaluate, generate, train

COMMANDS: dict[str, ModuleType] = {"train": train, "evaluate": evaluate, "generate": generate}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_impl",
        description="LoRA fine-tuning in pure MLX, checked against PyTorch.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        help_text = module.HELP
        command = commands.add_parser(
            name, help=help_text, description=help_text.capitalize() + ".", allow_abbrev=False
        )
        module.add_flags(command)
    return parser
