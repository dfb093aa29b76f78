"""`python -m tests.fuzz TARGET FOLDER [CASE]`: every case of a target, or one; a line for what went wrong.

FOLDER must be new or empty. FUZZ_SEED and FUZZ_TIMES, other cases and more of them, are for a long search.

The number of each case is written before it is tried, so that a crash has a name. Address space is capped: a
file of some kilobytes that asks for gigabytes must be refused before they are allocated.
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

SECONDS = 30  # a case takes milliseconds, and a chat template has 3 seconds of CPU time on a busy machine
MEMORY_BYTES = 1 << 30  # beyond what the process has at the start
LINE_LENGTH = 700


class Hang(BaseException):
    """No Exception, so that nothing catches it on the way."""


def main(target: str, folder: Path, only: int | None = None) -> None:
    spec = TARGETS[target]
    spec.write(folder)
    file = folder / spec.file
    valid = file.read_bytes()
    spec.read(folder)  # it is
    cap_memory()
    signal.signal(signal.SIGALRM, hang)
    refused = 0
    times, seed = int(os.environ.get("FUZZ_TIMES", "1")), os.environ.get("FUZZ_SEED", "")
    for case in range(times * spec.num_cases) if only is None else (only,):
        rng = random.Random(zlib.crc32(f"{target} {case}{seed}".encode()))
        mutation = spec.mutations[case % len(spec.mutations)]
        file.write_bytes(mutation(valid, rng))
        print(f"case {case} {mutation.__name__}", flush=True)
        try:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
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
    """What is wrong with a refusal; nothing where it is one printable line that names the file."""
    length = len(sentence.replace(str(folder), ""))
    if not sentence.startswith(str(folder)):
        return f"does not begin with the file: {sentence[:200]!r}"
    if not sentence.isprintable():
        return f"is not one printable line: {sentence[:200]!r}"
    if length > LINE_LENGTH:
        return f"is a line of {length} characters: {sentence[:200]!r}"
    return ""


def hang(*_: object) -> None:
    raise Hang(f"took more than {SECONDS} seconds")


def cap_memory() -> None:
    """Linux: macOS enforces no such limit."""
    status = Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


if __name__ == "__main__":
    try:
        require_new_folder(where := Path(sys.argv[2]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], where, int(sys.argv[3]) if len(sys.argv) > 3 else None)
