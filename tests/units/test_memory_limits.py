"""What memory there is, read from files and numbers that stand for a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_impl.machine import memory_limits
from mlx_impl.machine.memory_limits import (
    MAPPED,
    Limit,
    TooLittle,
    device_limits,
    left_of_address_space,
    left_of_control_groups,
    require_bytes,
    shown,
)

GIB = 2**30


def write_group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_a_control_group_and_all_above_it_count(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/outer/inner\n")
    write_group(tmp_path, memory__max="max", memory__current=9, memory__stat="inactive_file 1")
    write_group(
        tmp_path / "outer", memory__max=1000, memory__current=600, memory__stat="anon 5\ninactive_file 50"
    )
    write_group(
        tmp_path / "outer/inner", memory__max=700, memory__current=100, memory__stat="inactive_file 0"
    )
    assert list(left_of_control_groups(tmp_path, tmp_path / "own")) == [600, 450]


def test_the_first_version_of_control_groups_has_other_names(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
    write_group(
        tmp_path / "memory/job",
        memory__limit_in_bytes=800,
        memory__usage_in_bytes=300,
        memory__stat="inactive_file 1\ntotal_inactive_file 100",
    )
    assert list(left_of_control_groups(tmp_path, tmp_path / "own")) == [600]


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert list(left_of_control_groups(tmp_path, tmp_path / "none")) == []
    (tmp_path / "own").write_text("0::/gone\n")
    assert list(left_of_control_groups(tmp_path, tmp_path / "own")) == []


def test_the_address_space_is_shared_with_the_program() -> None:
    """What it has mapped, or what the whole of it will have; arrays are in that already."""
    assert left_of_address_space(8 * GIB, mapped=3 * GIB, held=GIB, program=GIB) == 5 * GIB - MAPPED
    assert left_of_address_space(8 * GIB, mapped=3 * GIB, held=GIB, program=4 * GIB) == 3 * GIB - MAPPED


def test_what_a_gpu_says() -> None:
    assert device_limits({"max_recommended_working_set_size": 5, "total_memory": 9})[0].num_bytes == 5
    assert device_limits({"total_memory": 9, "device_name": "x"}) == [Limit("the GPU's memory", 9, True)]
    assert device_limits({}) == []


def test_rooms_of_this_machine_are_sorted_and_some_are_hard() -> None:
    found = memory_limits.limits()
    assert found == sorted(found, key=lambda limit: limit.num_bytes)
    assert any(limit.is_hard for limit in found)


def test_too_little_room_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory_limits, "limits", lambda: [Limit("free", 1, False), Limit("RLIMIT_AS", 5 * GIB, True)]
    )
    require_bytes("reading x", 4 * GIB)
    with pytest.raises(TooLittle, match=r"^reading x needs about 6.0 GiB and .* 5.0 GiB \(RLIMIT_AS\)$"):
        require_bytes("reading x", 6 * GIB)


def test_sizes_as_a_person_reads_them() -> None:
    assert (shown(1.25 * GIB), shown(300 * 2**20), shown(-1)) == ("1.2 GiB", "300 MiB", "0 MiB")
