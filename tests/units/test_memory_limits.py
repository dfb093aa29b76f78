"""Memory limits, read from made-up files and numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_impl.machine import memory_limits
from mlx_impl.machine.memory_limits import (
    UNUSED_BYTES,
    Limit,
    TooLittleMemory,
    device_limits,
    format_bytes,
    remaining_address_space,
    remaining_in_control_groups,
    require_bytes,
)

GIB = 2**30


def write_group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_limits_of_a_control_group_and_its_parents_count(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/outer/inner\n")
    write_group(tmp_path, memory__max="max", memory__current=9, memory__stat="inactive_file 1")
    write_group(
        tmp_path / "outer", memory__max=1000, memory__current=600, memory__stat="anon 5\ninactive_file 50"
    )
    write_group(
        tmp_path / "outer/inner", memory__max=700, memory__current=100, memory__stat="inactive_file 0"
    )
    assert list(remaining_in_control_groups(tmp_path, tmp_path / "own")) == [600, 450]


def test_version_1_of_control_groups_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
    write_group(
        tmp_path / "memory/job",
        memory__limit_in_bytes=800,
        memory__usage_in_bytes=300,
        memory__stat="inactive_file 1\ntotal_inactive_file 100",
    )
    assert list(remaining_in_control_groups(tmp_path, tmp_path / "own")) == [600]


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert list(remaining_in_control_groups(tmp_path, tmp_path / "none")) == []
    (tmp_path / "own").write_text("0::/gone\n")
    assert list(remaining_in_control_groups(tmp_path, tmp_path / "own")) == []


def test_the_address_space_is_shared_with_the_program() -> None:
    """The program counts as it is mapped now, without the arrays, or at its peak if that is more."""
    assert remaining_address_space(8 * GIB, mapped=3 * GIB, active=GIB, program=GIB) == 5 * GIB - UNUSED_BYTES
    assert (
        remaining_address_space(8 * GIB, mapped=3 * GIB, active=GIB, program=4 * GIB)
        == 3 * GIB - UNUSED_BYTES
    )


def test_the_limit_of_a_gpu_is_its_working_set_or_its_memory() -> None:
    assert device_limits({"max_recommended_working_set_size": 5, "total_memory": 9})[0].num_bytes == 5
    assert device_limits({"total_memory": 9, "device_name": "x"}) == [Limit("the GPU's memory", 9, True)]
    assert device_limits({}) == []


def test_the_limits_of_this_machine_are_sorted_and_one_is_hard() -> None:
    found = memory_limits.memory_limits()
    assert found == sorted(found, key=lambda limit: limit.num_bytes)
    assert any(limit.is_hard for limit in found)


def test_an_exceeded_hard_limit_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory_limits, "memory_limits", lambda: [Limit("free", 1, False), Limit("RLIMIT_AS", 5 * GIB, True)]
    )
    require_bytes("reading x", 4 * GIB)
    with pytest.raises(
        TooLittleMemory, match=r"^reading x needs about 6.0 GiB but .* 5.0 GiB \(RLIMIT_AS\)$"
    ):
        require_bytes("reading x", 6 * GIB)


def test_bytes_are_shown_as_mib_or_gib() -> None:
    assert (format_bytes(1.25 * GIB), format_bytes(300 * 2**20), format_bytes(-1)) == (
        "1.2 GiB",
        "300 MiB",
        "0 MiB",
    )
