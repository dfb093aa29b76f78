"""What a rank prints: the first all, the others only why they fail. No MLX import."""

from __future__ import annotations

import os
import sys

from ..machine.launcher import launched_rank


def is_first() -> bool:
    """Whether this is rank 0 or the only process: it prints, and gives the command to continue with."""
    return not launched_rank()


def print_nothing_unless_first() -> None:
    """Standard output goes nowhere on all ranks but the first; standard error stays, for failures."""
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process


def with_rank(message: str) -> str:
    """The message, with the rank that has failed in front of it."""
    rank = launched_rank()
    return message if rank is None else f"rank {rank}: {message}"
