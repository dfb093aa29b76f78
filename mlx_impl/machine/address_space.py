"""The address space that this process may have (`ulimit -v`), and what the program takes before any model.

Where there is no room for its threads, a BLAS or OpenMP ends the process by a signal, and how much they map
depends on libraries and processors. So it is tried: another process, under the same limit, loads what a
command loads, and says how much that was. Only where there is a limit; it takes half a second. No MLX import.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys

M_ARENA_MAX = -8  # of glibc's malloc.h
LINUX = sys.platform == "linux"  # macOS does not enforce the limit
PROBE = "mlx_impl.cli.address_space_probe"

_program_bytes = 0  # as the probe found it; 0 where nobody has asked


def address_space_limit() -> int | None:
    """RLIMIT_AS in bytes; None where there is none."""
    if not LINUX:
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def program_bytes() -> int:
    return _program_bytes


def require_start(blas: str | None) -> None:
    """ValueError in one sentence where the limit leaves no room for the program itself."""
    global _program_bytes
    limit = address_space_limit()
    if limit is None:
        return
    share_pools()
    command = [sys.executable, "-m", PROBE, blas or ""]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        _program_bytes = int(done.stdout)  # nothing, or another text, where it did not come to its end
    except (OSError, MemoryError, ValueError):
        raise ValueError(
            f"the program needs more address space than it may have, before any model: the limit, "
            f"RLIMIT_AS, is {limit / 2**20:.0f} MiB (`ulimit -v`)"
        ) from None


def share_pools() -> None:
    """Let all threads allocate from one pool: glibc reserves 64 MiB for each thread that has its own.

    Without it MLX's threads for reading files reserve as much as a small model needs.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
