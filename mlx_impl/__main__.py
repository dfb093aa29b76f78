"""`python -m mlx_impl`: one of the commands in `cli/`.

A wrong input ends with one sentence on standard error and exit code 2; Ctrl-C, SIGTERM and SIGHUP with 130,
143 and 129; a reader of standard output who has enough (`| head`) quietly, with 141, as a program that
SIGPIPE ends. The last line after a stop is the command to go on with. An optimized BLAS is loaded before
anything imports MLX, which commands therefore do late.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .cli.command_line import command_line
from .cli.interrupt import Stopped, handling, stop_at_once
from .cli.parser import COMMANDS, parse_arguments
from .machine.address_space import require_start
from .machine.blas import load_optimized_blas

BAD_INPUT, NO_READER = 2, 141


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without accents is no reason to fail
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with handling(stop_at_once):
            run(parse_arguments(words))
    except ValueError as error:
        return fail(str(error), error)
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        print_notes(error)
        return NO_READER
    except OSError as error:
        return fail(f"{error.filename or 'the system'}: {error.strerror or error}", error)
    except RuntimeError as error:  # MLX's, such as a GPU's without memory
        if not hasattr(error, "__notes__"):
            raise
        return fail(str(error), error)
    except MemoryError as error:
        return fail("there is too little memory: Python could get no more", error)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        if words[:1] == ["train"] and not hasattr(stop, "__notes__"):  # nothing is saved
            stop.add_note(f"begin again with: {command_line(*words)}")
        print_notes(stop)
        return stop.exit_code
    return 0


def run(args: argparse.Namespace) -> None:
    require_start(getattr(args, "blas", None))
    is_result_only = args.json or args.command != "train"  # standard output is for the result
    if "blas" in args:  # a command that multiplies matrices
        sentence = load_optimized_blas(args.blas).sentence
        print(sentence, file=sys.stderr if is_result_only else sys.stdout, flush=True)
    COMMANDS[args.command].run(args)
    print(end="", flush=True)


def fail(message: str, error: Exception) -> int:
    from .cli.screen.console import print_error  # rich takes a tenth of a second

    print_error(message)
    print_notes(error)
    return BAD_INPUT


def print_notes(error: BaseException) -> None:
    """How to go on, where that is known."""
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
