"""`python -m tests.fuzz TARGET FOLDER [CASE]`: run all cases of a target, or one; print what goes wrong.

FOLDER must be new or empty. For a longer search, FUZZ_SEED gives other cases and FUZZ_TIMES more of them.

The number of each case is printed before it runs, so that a crash can be replayed. Address space is limited:
a small file that asks for gigabytes must be refused before they are allocated.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import zlib
from pathlib import Path

from mlx_impl.disk.output_folder import require_new_folder
from tests.fuzz.targets import TARGETS

MAX_SECONDS = 30  # of a case; most take milliseconds, a chat template may take 3 seconds of CPU time
MAX_BYTES = 1 << 30  # of address space, beyond what the process has at the start
MAX_LINE_LENGTH = 700


class Hang(BaseException):
    """Not an Exception, so that no reader catches it."""


def main(target: str, folder: Path, only: int | None = None) -> None:
    spec = TARGETS[target]
    spec.write(folder)
    file = folder / spec.file
    valid = file.read_bytes()
    spec.read(folder)  # the undamaged file must load
    limit_memory()
    signal.signal(signal.SIGALRM, hang)
    refused = 0
    times, seed = float(os.environ.get("FUZZ_TIMES", "1")), os.environ.get("FUZZ_SEED", "")
    for case in range(round(times * spec.num_cases)) if only is None else (only,):
        rng = random.Random(zlib.crc32(f"{target} {case}{seed}".encode()))
        mutation = spec.mutations[case % len(spec.mutations)]
        file.write_bytes(mutation(valid, rng))
        print(f"case {case} {mutation.__name__}", flush=True)
        try:
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
            spec.read(folder)
        except ValueError as error:
            refused += 1
            complaint = complaint_about(str(error), folder)
        except BaseException as error:
            complaint = f"{type(error).__name__}: {str(error)[:200]!r}"
        else:
            complaint = ""
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if complaint:
            print(f"WRONG {case} {mutation.__name__}: {complaint}", flush=True)
    print(f"DONE {refused} refused", flush=True)


def complaint_about(sentence: str, folder: Path) -> str:
    """What is wrong with an error message; empty if it is one printable line that begins with the file."""
    length = len(sentence.replace(str(folder), ""))
    if not sentence.startswith(str(folder)):
        return f"does not begin with the file: {sentence[:200]!r}"
    if not sentence.isprintable():
        return f"is not one printable line: {sentence[:200]!r}"
    if length > MAX_LINE_LENGTH:
        return f"is a line of {length} characters: {sentence[:200]!r}"
    return ""


def hang(*_: object) -> None:
    raise Hang(f"took more than {MAX_SECONDS} seconds")


def limit_memory() -> None:
    """On Linux only: macOS does not enforce this limit."""
    status = Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))


if __name__ == "__main__":
    try:
        require_new_folder(where := Path(sys.argv[2]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], where, int(sys.argv[3]) if len(sys.argv) > 3 else None)
