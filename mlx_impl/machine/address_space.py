"""The limit on this process's address space (`ulimit -v`), and how much of it the program needs itself.

Without room for its threads, a BLAS or OpenMP ends the process with a signal. How much they map depends on
the libraries and the processor. So under a limit the program first starts another process (PROBE), under the
same limit, which loads everything that a command loads and prints how much that was. This takes half a
second. No MLX import.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys

M_ARENA_MAX = -8  # from glibc's malloc.h
LINUX = sys.platform == "linux"  # macOS does not enforce the limit
PROBE = "mlx_impl.cli.address_space_probe"

_program_bytes = 0  # the result of the probe; 0 before it has run


def address_space_limit() -> int | None:
    """RLIMIT_AS in bytes; None for no limit."""
    if not LINUX:
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def program_bytes() -> int:
    return _program_bytes


def require_address_space(blas: str | None) -> None:
    """ValueError where the limit leaves no room for the program itself."""
    global _program_bytes
    limit = address_space_limit()
    if limit is None:
        return
    use_one_malloc_arena()
    command = [sys.executable, "-m", PROBE, blas or ""]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        _program_bytes = int(done.stdout)  # ValueError where the probe did not reach its end
    except (OSError, MemoryError, ValueError):
        raise ValueError(
            f"the program alone, without a model, needs more address space than the limit RLIMIT_AS "
            f"(`ulimit -v`) of {limit / 2**20:.0f} MiB"
        ) from None


def use_one_malloc_arena() -> None:
    """Let all threads share one malloc arena: glibc reserves 64 MiB of address space for each further one.

    With an arena each, MLX's threads for reading files reserve as much as a small model needs.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
