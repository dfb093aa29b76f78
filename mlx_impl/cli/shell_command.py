"""Commands for the user to copy from the terminal. No MLX import."""

from __future__ import annotations

import shlex
import shutil
import sys


def shell_command(*words: object) -> str:
    """`python -m mlx_impl WORDS`, quoted for a shell, with the Python that runs now."""
    found = shutil.which("python")
    python = "python" if found == sys.executable else sys.executable
    return shlex.join([python, "-m", "mlx_impl", *map(str, words)])


def path_argument(path: object) -> str:
    """The path as a flag's value; with `./` in front where argparse would take it for a flag."""
    return f"./{path}" if str(path).startswith("-") else str(path)
