"""`python -m mlx_impl`: one of the commands in `cli/`.

A wrong input ends with one sentence on standard error and exit code 2, Ctrl-C with 130, a reader of standard
output who has enough (`| head`) quietly, with 141, as a program that SIGPIPE ends. An optimized BLAS is
loaded before anything imports MLX, which commands therefore do late.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .address_space import require_start
from .blas import load_optimized_blas
from .cli.parser import COMMANDS, parse_arguments

BAD_INPUT, INTERRUPTED, NO_READER = 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without accents is no reason to fail
    try:
        run(parse_arguments(arguments))
    except ValueError as error:
        return fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return NO_READER
    except OSError as error:
        return fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except MemoryError:
        return fail("there is too little memory: Python could get no more")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(args: argparse.Namespace) -> None:
    require_start(getattr(args, "blas", None))
    is_result_only = args.json or args.command != "train"  # standard output is for the result
    if "blas" in args:  # a command that multiplies matrices
        sentence = load_optimized_blas(args.blas).sentence
        print(sentence, file=sys.stderr if is_result_only else sys.stdout, flush=True)
    COMMANDS[args.command].run(args)
    print(end="", flush=True)


def fail(message: str) -> int:
    from .cli.console import print_error  # rich takes a tenth of a second

    print_error(message)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
