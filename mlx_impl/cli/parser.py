"""The parser of all commands; each command's module adds its own flags. No MLX import."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import __version__
from . import convert, evaluate, fuse, generate, inspect, train
from .settings.config_file import read_config
from .settings.flag_hints import hint
from .settings.precedence import merge_settings
from .shell_command import program

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
        prog=program(),
        description="LoRA fine-tuning in pure MLX, checked against PyTorch.",
        epilog=f"Each command has its own help: {program()} COMMAND --help",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        help_text = module.HELP
        description = help_text[0].upper() + help_text[1:] + "."
        command = commands.add_parser(name, help=help_text, description=description, allow_abbrev=False)
        module.add_flags(command)
    return parser


class ShowVersion(argparse.Action):
    """Print the versions of this package, MLX and Python, and exit. They are looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"mlx-lora {__version__}, mlx {version('mlx')}, Python {platform.python_version()}")
        parser.exit()


def command_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Each command's own parser, by the command's name."""
    return next(dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a command. Flags win over the --config file, which wins over the run to resume.

    Raises ValueError for a wrong file. A wrong command line exits with code 2, as argparse does.
    """
    parser = make_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    require_known_flags(words, command_parsers(parser))
    args, unknown = parser.parse_known_args(arguments)
    command = command_parsers(parser)[args.command]
    if unknown:
        instead = hint(unknown[0].partition("=")[0], command._option_string_actions, "flag")
        command.error(f"unrecognized arguments: {' '.join(unknown)}{instead}")
    if getattr(args, "config", None) is None and getattr(args, "resume", None) is None:
        return args
    for action in command._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(arguments))  # without defaults: only the flags on the command line
    return argparse.Namespace(**{**vars(args), **with_files(args, command, given)})


def require_known_flags(words: Sequence[str], commands: dict[str, argparse.ArgumentParser]) -> None:
    """Where a command has required flags: the hint for a mistyped one, before argparse calls it missing."""
    command = commands.get(words[0]) if words else None
    if command is None:
        return
    parts = [*command._actions, *command._mutually_exclusive_groups]
    if not any(getattr(part, "required", False) for part in parts):
        return
    for word in takewhile("--".__ne__, words[1:]):
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in command._option_string_actions:
            instead = hint(flag, command._option_string_actions, "flag")
            if instead:
                command.error(f"unrecognized arguments: {flag}{instead}")


def with_files(
    args: argparse.Namespace, command: argparse.ArgumentParser, given: dict[str, Any]
) -> dict[str, Any]:
    """The given flags, merged with the --config file and the settings of the run to resume."""
    if "resume" in given and "adapter_path" in given:
        raise ValueError("--resume already names the run's folder: leave --adapter-path out")
    if args.config is not None:
        given = merge_settings(command, read_config(args.config), given, args.config)
    if args.resume is not None:
        given = merge_settings(command, saved_settings(args.resume), given, args.resume)
    return given


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in the manifest of the run to resume."""
    from .training.manifest import read

    return read(folder).settings
