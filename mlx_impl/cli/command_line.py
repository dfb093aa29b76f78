"""Commands to be copied from a terminal: they name the Python that runs now. No MLX import."""

from __future__ import annotations

import shlex
import shutil
import sys


def command_line(*words: object) -> str:
    """`python -m mlx_impl WORDS`, for a shell."""
    found = shutil.which("python")
    python = "python" if found == sys.executable else sys.executable
    return shlex.join([python, "-m", "mlx_impl", *map(str, words)])


def as_value(path: object) -> str:
    """A path as the value of a flag, for which one that begins with a dash would be taken."""
    return f"./{path}" if str(path).startswith("-") else str(path)
