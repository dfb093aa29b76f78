"""Processes that form a ring on the loopback address, as `mlx.launch --backend ring` starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLANTED = "PLANTED_MUTANT"  # the environment variable that names the bug which each process plants
SECONDS = 180  # for all that a few updates of a tiny model take on a machine that does much else


def start(folder: Path, num_ranks: int, *arguments: str) -> list[subprocess.Popen]:
    """`python -m ARGUMENTS` on each rank, with free ports; the folder gets the list of the hosts."""
    return start_each(folder, [arguments] * num_ranks)


def start_each(folder: Path, arguments: Sequence[Sequence[str]]) -> list[subprocess.Popen]:
    """`start`, with arguments for each rank."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in arguments]
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    return [
        subprocess.Popen(
            [sys.executable, "-m", *of_rank],
            cwd=ROOT,
            env={**os.environ, "MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, of_rank in enumerate(arguments)
    ]


def outputs(ranks: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each; nothing is left running."""
    try:
        done = [rank.communicate(timeout=SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, done, strict=True)]
