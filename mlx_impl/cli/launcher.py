"""Which rank a launcher made of this process. No MLX import.

Source: the variables that mlx.launch, Open MPI and MPICH set.
"""

from __future__ import annotations

import os
import sys

RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched_rank() -> int | None:
    """None without a launcher."""
    given = (os.environ.get(name, "") for name in RANK_VARIABLES)
    return next((int(text) for text in given if text.isdecimal()), None)


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
