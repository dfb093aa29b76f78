"""Atomic writes and checked reads of single files."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_impl.disk import files
from mlx_impl.disk.files import (
    atomic_write,
    read_json_object,
    read_text,
    remove_temporary_files,
    require_file,
)


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.json") as part:
        part.write_text("{}")
        assert not (tmp_path / "a.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failure_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_write(tmp_path / "a.json") as part:
        part.write_text("half")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"{", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b"[" * 100_000, "must be JSON"),
    ],
)
def test_an_error_about_json_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json_object(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_temporary_file_never_replaces_a_users_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first random name is taken."""
    tokens = iter(["00000000", "00000000", "11111111"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    (theirs := tmp_path / f".a.00000000.{files.PROCESS_TOKEN}.part.json").write_text("theirs")
    with atomic_write(tmp_path / "a.json") as part:
        part.write_text("{}")
        assert part.suffix == ".json" and part != theirs
    assert theirs.read_text() == "theirs"
    assert (tmp_path / "a.json").read_text() == "{}"


@pytest.mark.parametrize("kind", ["link", "folder", "named pipe", "broken link"])
def test_only_a_regular_file_is_overwritten(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "a.json", tmp_path / "other"
    if kind == "folder":
        path.mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
    if kind == "link":
        other.write_text("theirs")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"but is a {kind.removeprefix('broken ')}"), atomic_write(path):
        raise AssertionError
    assert sorted(tmp_path.iterdir()) == before
    assert kind != "link" or other.read_text() == "theirs"


def test_only_a_dead_processs_own_temporary_files_are_removed(tmp_path: Path) -> None:
    dead, alive = "0123456789abcdef", "fedcba9876543210"
    theirs = [
        "a.part.json", ".part", f".{dead}.part", f"a.00000000.{dead}.part.json",
        f".a.00000000.{alive}.part.json", f".a.00000000.{dead}.part.json.gz",
        f".a.0000000.{dead}.part", "link", f".d.00000000.{dead}.part",
    ]  # fmt: skip
    for name in theirs[:-2]:
        (tmp_path / name).write_text(name)
    (tmp_path / "link").write_text("behind a link")
    (tmp_path / theirs[-1]).mkdir()
    (tmp_path / f".l.00000000.{dead}.part.json").symlink_to(tmp_path / "link")
    for name in (f".a.00000000.{dead}.part.json", f".best.1234abcd.{dead}.part"):
        (tmp_path / name).write_text("ours")
    remove_temporary_files(tmp_path, dead)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*theirs, f".l.00000000.{dead}.part.json"}
    assert (tmp_path / "link").read_text() == "behind a link"


@pytest.mark.parametrize("read", [read_json_object, read_text, require_file])
@pytest.mark.parametrize("kind", ["named pipe", "folder", "device", "socket"])
def test_a_file_that_is_not_regular_is_not_opened(
    tmp_path: Path, read: Callable[[Path], object], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = Path("a.json")
    if kind == "folder":
        path.mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    with pytest.raises(ValueError, match=f"^a.json: must be a regular file, but is a {kind}$"):
        read(path)


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "a.json").symlink_to("blob")
    assert read_json_object(tmp_path / "a.json") == {"a": 1}


def test_a_file_above_the_size_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("12345")
    assert read_text(tmp_path / "a", 5) == "12345"
    with pytest.raises(ValueError, match="a: must have at most 4 bytes, got 5"):
        read_text(tmp_path / "a", 4)
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="/proc/self/status: must have at most 4 bytes, got more"):
            read_text(Path("/proc/self/status"), 4)  # stat reports size 0
