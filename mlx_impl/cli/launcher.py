"""What a rank prints: the first all, the others only why they fail; and how its launcher is called again.

No MLX import. Source: the variables that mlx.launch and Open MPI set.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from ..machine.launcher import launched_rank

LAUNCHER = "mlx.launch"


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


def launcher_words() -> list[str]:
    """`mlx.launch -n 2 --backend ring --`, which starts these ranks again; [] without a launcher.

    The ranks are not told the path of the launcher's hostfile: for several machines it is HOSTFILE.
    """
    if launched_rank() is None:
        return []
    backend, num_local = backend_and_ranks()
    hosts = ["-n", str(num_local)] if num_local else ["--hostfile", "HOSTFILE"]
    beside_python = Path(sys.executable).with_name(LAUNCHER)
    is_found = shutil.which(LAUNCHER) or not beside_python.exists()
    return [LAUNCHER if is_found else str(beside_python), *hosts, "--backend", backend, "--"]


def backend_and_ranks() -> tuple[str, int]:
    """The backend, and the number of ranks where all are on this machine; 0 where they may not be."""
    given = os.environ.get
    if "MLX_IBV_DEVICES" in os.environ:
        return "jaccl-ring" if "MLX_JACCL_RING" in os.environ else "jaccl", 0
    if "NCCL_HOST_IP" in os.environ:
        is_local = is_loopback(given("NCCL_HOST_IP", ""))
        return "nccl", int(given("MLX_WORLD_SIZE", "0")) if is_local else 0
    if "MLX_HOSTFILE" in os.environ:
        return "ring", local_ring(Path(given("MLX_HOSTFILE", "")))
    size = given("OMPI_COMM_WORLD_SIZE", "0")
    return "mpi", int(size) if size == given("OMPI_COMM_WORLD_LOCAL_SIZE") else 0


def local_ring(hostfile: Path) -> int:
    """The number of ranks in the ring that MLX has read from the file; 0 if one is on another machine."""
    try:
        of_ranks = json.loads(hostfile.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return len(of_ranks) if all(is_loopback(str(one)) for addresses in of_ranks for one in addresses) else 0


def is_loopback(address: str) -> bool:
    return address.startswith("127.")
