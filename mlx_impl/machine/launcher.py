"""Which rank a launcher made of this process. No MLX import.

Source: the variables that mlx.launch, Open MPI and MPICH set.
"""

from __future__ import annotations

import os

RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched_rank() -> int | None:
    """None without a launcher."""
    given = (os.environ.get(name, "") for name in RANK_VARIABLES)
    return next((int(text) for text in given if text.isdecimal()), None)
