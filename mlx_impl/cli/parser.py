"""The parser over all commands; each command's module brings its own flags. No MLX import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType

from . import convert, evaluate, fuse, generate, inspect, train
from .settings import closest, with_config

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
    """The command line; beneath it the file of --config, beneath that the defaults.

    Raises ValueError for a wrong file; a wrong command line ends the program, as argparse does.
    """
    parser = make_parser()
    args, unknown = parser.parse_known_args(arguments)
    command = commands_of(parser)[args.command]
    if unknown:
        near = closest(unknown[0].partition("=")[0], command._option_string_actions)
        hint = f"; the closest flag is {near}" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if getattr(args, "config", None) is not None:
        for action in command._actions:
            action.default = argparse.SUPPRESS
        given = vars(parser.parse_args(arguments))  # and nothing else
        args = argparse.Namespace(**{**vars(args), **with_config(command, args.config, given)})
    return args
