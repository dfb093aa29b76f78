"""`mlx-lora COMMAND`, or `python -m mlx_impl COMMAND`: runs one of the commands in `cli/`.

Exit codes: 0 on success; 2 for a wrong input, after one sentence on standard error; 1 where another rank has
ended; 130, 143 and 129 after Ctrl-C, SIGTERM and SIGHUP; 141, silently, where the reader of standard output
has left (`| head`). After a stop the last line is the command to continue with. An optimized BLAS must be
loaded before MLX is imported, so the commands import MLX late.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .cli.launcher import is_first, print_nothing_unless_first, with_rank
from .cli.parser import COMMANDS, parse_arguments
from .cli.shell_command import shell_command
from .cli.signals import StoppedBySignal, handle_signals, raise_stopped
from .machine.address_space import require_address_space
from .machine.blas import load_optimized_blas
from .run.watchdog import EXIT_LOST, RankLost

EXIT_BAD_INPUT, EXIT_BROKEN_PIPE = 2, 141


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without accents must not end the program
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with handle_signals(raise_stopped):
            run(parse_arguments(words))
    except ValueError as error:
        return fail(str(error), error)
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        print_notes(error)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return fail(f"{error.filename or 'the system'}: {error.strerror or error}", error)
    except RankLost as error:
        return fail(str(error), error, EXIT_LOST)
    except RuntimeError as error:  # from MLX, such as a GPU out of memory
        if not hasattr(error, "__notes__"):
            raise
        return fail(str(error), error)
    except MemoryError as error:
        return fail("Python ran out of memory", error)
    except StoppedBySignal as stop:
        return stopped(stop, words)
    return 0


def run(args: argparse.Namespace) -> None:
    if getattr(args, "distributed", False):
        print_nothing_unless_first()
    require_address_space(getattr(args, "blas", None))
    prints_result_only = args.json or args.command != "train"
    if "blas" in args:  # only commands that multiply matrices have the flag
        sentence = load_optimized_blas(args.blas).sentence
        print(sentence, file=sys.stderr if prints_result_only else sys.stdout, flush=True)
    COMMANDS[args.command].run(args)
    print(end="", flush=True)


def fail(message: str, error: Exception, code: int = EXIT_BAD_INPUT) -> int:
    from .cli.screen.console import print_error  # importing rich takes a tenth of a second

    print_error(with_rank(message))
    print_notes(error)
    return code


def stopped(stop: StoppedBySignal, words: list[str]) -> int:
    print(with_rank(str(stop)), file=sys.stderr)
    is_resumable = hasattr(stop, "__notes__")  # resume_hint adds the note
    if words[:1] == ["train"] and not is_resumable:
        stop.add_note(f"start again with: {shell_command(*words, launched=True)}")
    print_notes(stop)
    return stop.exit_code


def print_notes(error: BaseException) -> None:
    """Print how to continue, where a note says so; on several ranks the first prints it."""
    if not is_first():
        return
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
