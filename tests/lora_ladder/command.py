"""The command `lora-ladder`: an adapter climbs; the report is on the screen, in JSON or HTML if asked for."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.lora_ladder.help_text import epilog
from tests.lora_ladder.here import ALIASES
from tests.lora_ladder.names import (
    Unusable,
    claim_of,
    did_you_mean,
    files,
    require_module,
    require_module_and_class,
)
from tests.lora_ladder.output import OutputError, require_writable
from tests.lora_ladder.page import MARK
from tests.lora_ladder.skeleton import write_skeleton
from tests.lora_ladder.versions import version_line

UNUSABLE, INTERRUPTED = 2, 130
JSON_MARK = '{\n  "schema": '


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status, as `--help` explains it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["init"]:
        return initialize(given[1:])
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the adapter's folder, as with python -m
    try:
        require_no_other_command(given)
        options = parser().parse_intermixed_args(given)
        trainer, claims = checked(options)
        from tests.lora_ladder.judging import judge  # PyTorch and pytest, which take seconds

        return judge(options, trainer, claims)
    except (Unusable, OutputError) as error:
        print(f"lora-ladder: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print("lora-ladder: interrupted before the first claim", file=sys.stderr)
        return INTERRUPTED


def require_no_other_command(given: Sequence[str]) -> None:
    """Also before --help: `run --help` asks about a command that is not there."""
    if given and not given[0].startswith("-") and given[0] not in ALIASES:
        require_module_and_class(given[0], "the trainer")


class Parser(argparse.ArgumentParser):
    """It names the option that is nearest to one that it does not know."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments:.*?(--[\w-]+)", message)
        super().error(message + (did_you_mean(unknown[1], self._option_string_actions) if unknown else ""))


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lora-ladder",
        usage="lora-ladder MODULE:CLASS [CLAIM ...] [options]\n       lora-ladder init [FILE]",
        description="Is this LoRA trainer right, and if not, what is the first thing that differs?",
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("trainer", metavar="MODULE:CLASS", help="the adapter, or: reference")
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="only these, as a replay names them")
    parser.add_argument("--rungs", metavar="N[-M]", help="only these rungs, judged alone")
    parser.add_argument("--keep-going", action="store_true", help="also judge rungs above a failed one")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long, as rung 18 does")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="other random weights and rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result for other programs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to send to someone")
    parser.add_argument(
        "--version", action="version", version=version_line(), help="show the versions and exit"
    )
    return parser


def checked(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The trainer as module:Class and the claims as pytest takes them. Raises Unusable or OutputError."""
    if options.draw < 0:
        raise Unusable(f"--draw must be at least 0, got {options.draw}")
    if options.claims and options.rungs is not None:
        raise Unusable("give claims or --rungs, not both: claims have their rung in their name")
    claims = [claim_of(name) for name in options.claims] or [str(path) for path in files(options.rungs)]
    if options.json and options.html and options.json.absolute() == options.html.absolute():
        raise Unusable(f"--json and --html must be two files, got {options.json} twice")
    require_writable(options.json, JSON_MARK)
    require_writable(options.html, MARK)
    trainer = ALIASES.get(options.trainer, options.trainer)
    require_module_and_class(trainer, "the trainer")
    require_module(trainer, "the trainer")
    return trainer, claims


def initialize(arguments: list[str]) -> int:
    """`lora-ladder init [FILE]`."""
    parser = argparse.ArgumentParser(prog="lora-ladder init", description="Write an adapter to fill in.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("my_adapter.py"), metavar="FILE")
    file = parser.parse_args(arguments).file
    try:
        write_skeleton(file)
    except OutputError as error:
        print(f"lora-ladder: {error}", file=sys.stderr)
        return UNUSABLE
    print(f"wrote {file}; fill it in, then: lora-ladder {file.stem}:MyTrainer")
    return 0
