"""The parser over all commands; each command's module brings its own flags. No MLX import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from . import convert, evaluate, fuse, generate, inspect, train
from .settings.config_file import read_config
from .settings.settings import closest, with_settings

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "inspect": inspect,
    "convert": convert,
    "fuse": fuse,
}


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
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", allow_abbrev=False
        )
        module.add_flags(command)
    return parser


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Each command's own parser."""
    return next(dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; beneath it the file of --config and the run to resume, beneath those the defaults.

    Raises ValueError for a wrong file; a wrong command line ends the program, as argparse does.
    """
    parser = make_parser()
    args, unknown = parser.parse_known_args(arguments)
    command = commands_of(parser)[args.command]
    if unknown:
        near = closest(unknown[0].partition("=")[0], command._option_string_actions)
        hint = f"; the closest flag is {near}" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if getattr(args, "config", None) is not None or getattr(args, "resume", None) is not None:
        for action in command._actions:
            action.default = argparse.SUPPRESS
        given = vars(parser.parse_args(arguments))  # and nothing else
        if "resume" in given and "adapter_path" in given:
            raise ValueError("--adapter-path is that of --resume: give one of them")
        if args.config is not None:
            given = with_settings(command, read_config(args.config), given, args.config)
        if args.resume is not None:
            given = with_settings(command, settings_of_run(args.resume), given, args.resume)
        args = argparse.Namespace(**{**vars(args), **given})
    return args


def settings_of_run(folder: Path) -> dict[str, Any]:
    """Those of a run that is resumed, beneath all that is given."""
    from .training.manifest import read

    return read(folder).settings
