"""The commands that a run of several ranks prints name the launcher, without which they would be refused."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from mlx_impl.cli.launcher import launcher_words
from mlx_impl.cli.shell_command import shell_command
from mlx_impl.machine.launcher import RANK_VARIABLES

LOCAL = [["127.0.0.1:32323"], ["127.0.0.1:32324"]]
TWO_MACHINES = [["192.168.0.1:32323", "10.0.0.1:32324"], ["192.168.0.2:32325"]]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    others = "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_RING", "NCCL_HOST_IP", "MLX_WORLD_SIZE"
    for name in (*RANK_VARIABLES, *others, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


def words() -> str:
    first, *rest = launcher_words() or ["mlx.launch"]
    assert Path(first).name == "mlx.launch"
    return shlex.join(rest)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [(LOCAL, "-n 2 --backend ring --"), (TWO_MACHINES, "--hostfile HOSTFILE --backend ring --")],
)
def test_a_ring_is_named_by_the_addresses_of_its_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hosts: list[list[str]], expected: str
) -> None:
    """The launcher does not tell the ranks where its own hostfile is."""
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(hostfile))
    assert words() == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NCCL_HOST_IP": "127.0.0.1", "MLX_WORLD_SIZE": "4"}, "-n 4 --backend nccl --"),
        ({"NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "4"}, "--hostfile HOSTFILE --backend nccl --"),
        ({"MLX_IBV_DEVICES": "/tmp/x"}, "--hostfile HOSTFILE --backend jaccl --"),
        ({"MLX_IBV_DEVICES": "/tmp/x", "MLX_JACCL_RING": "1"}, "--hostfile HOSTFILE --backend jaccl-ring --"),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, "-n 3 --backend mpi --"),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
         "--hostfile HOSTFILE --backend mpi --"),
        ({"MLX_HOSTFILE": "/there/is/none"}, "--hostfile HOSTFILE --backend ring --"),
    ],
)  # fmt: skip
def test_another_backend_is_named_by_its_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK" if "mpi" in expected else "MLX_RANK", "0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert words() == expected


def test_a_command_of_a_rank_begins_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where all ranks are to run it: a question to the adapter needs one process."""
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("NCCL_HOST_IP", "127.0.0.1")
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    alone, launched = shell_command("train", "--x"), shell_command("train", "--x", launched=True)
    assert launched == f"{shlex.join(launcher_words())} {alone}"


def test_without_a_launcher_there_are_no_such_words() -> None:
    assert launcher_words() == []
    assert shell_command("train", launched=True) == shell_command("train")


def test_a_launcher_that_is_not_on_the_path_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("PATH", "")
    assert launcher_words()[0] == str(Path(sys.executable).with_name("mlx.launch"))
