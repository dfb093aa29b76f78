"""Files out are whole or absent; JSON files in are objects or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_impl.files import read_json_object, whole_file


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.json") as part:
        part.write_text("{}")
        assert not (tmp_path / "a.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failure_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OSError, match="disk full"), whole_file(tmp_path / "a.json") as part:
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
def test_what_is_no_json_object_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json_object(path)
    assert str(caught.value).startswith(f"{path}: ")
