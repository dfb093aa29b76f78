"""Commands for the user to copy from the terminal. No MLX import."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

from .launcher import launcher_words

SCRIPT, MODULE = "mlx-lora", "python -m mlx_impl"  # two names of one program


def program() -> str:
    """The name by which the user called the program."""
    return SCRIPT if os.path.basename(sys.argv[0]) == SCRIPT else MODULE


def shell_command(*words: object, launched: bool = False) -> str:
    """`mlx-lora WORDS` or `python -m mlx_impl WORDS`, quoted for a shell, as the user called it.

    `launched`: on a rank its launcher comes before, because all ranks are to run it.
    """
    return shlex.join([*(launcher_words() if launched else []), *program_words(), *map(str, words)])


def program_words() -> list[str]:
    if program() == SCRIPT:
        path = os.path.abspath(sys.argv[0])
        return [SCRIPT if shutil.which(SCRIPT) == path else path]
    found = shutil.which("python")
    return ["python" if found == sys.executable else sys.executable, "-m", "mlx_impl"]


def path_argument(path: object) -> str:
    """The path as a flag's value; with `./` in front where argparse would take it for a flag."""
    return f"./{path}" if str(path).startswith("-") else str(path)
