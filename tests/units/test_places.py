"""Where a result may go: to a new or empty folder, apart from all that is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_impl.disk.places import free_folder, is_empty, require_apart, require_new_folder


def test_what_file_browsers_leave_does_not_count(tmp_path: Path) -> None:
    assert is_empty(tmp_path)
    for name in (".DS_Store", "._.DS_Store", ".localized", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_text("junk")
    assert is_empty(tmp_path)
    (tmp_path / "._folder").mkdir()
    assert not is_empty(tmp_path)
    assert not is_empty(tmp_path / "nothing")


def test_a_link_of_such_a_name_counts(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").symlink_to("elsewhere")
    assert not is_empty(tmp_path)


def test_the_first_free_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert free_folder(out) == out
    out.mkdir()
    assert free_folder(out) == out
    (out / "a").touch()
    (tmp_path / "out-2").touch()
    (tmp_path / "out-3").symlink_to("nowhere")
    assert free_folder(out) == tmp_path / "out-4"
    monkeypatch.chdir(out)
    assert free_folder(Path(".")) == tmp_path / "out-4"
    assert free_folder(Path("..") / "out") == Path("..") / "out-4"


def test_a_folder_that_is_not_empty_is_refused_and_another_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(
        ValueError, match=f"^{tmp_path}: must be a new or an empty folder, such as {tmp_path}-2$"
    ):
        require_new_folder(tmp_path)


@pytest.mark.parametrize(
    ("save", "other", "free"),
    [
        ("model", "model", "model-2"),  # is it
        ("", "model", None),  # contains it
        ("deep", "deep/er/file.gguf", "deep-2"),
        ("model/out", "model", "out"),  # lies inside it
        ("model/new/out", "model", "out"),
        ("link/out", "model", "out"),  # by way of a link
        ("model/out", "link", "out"),
        ("model/../model/out", "model", "out"),
        ("link", "model", "link-2"),
    ],
)
def test_what_is_read_and_what_is_written_are_apart(
    tmp_path: Path, save: str, other: str, free: str | None
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").touch()
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "file.gguf").touch()
    path, read = tmp_path / save, tmp_path / other
    with pytest.raises(ValueError, match="must not be, contain or lie inside the model") as caught:
        require_apart(path, {"model": read})
    sentence = (
        f"the folder to write, {path}, must not be, contain or lie inside the model {read}: choose another"
    )
    assert str(caught.value).startswith(sentence)
    assert free is None or str(caught.value).endswith(f", such as {tmp_path / free}")


def test_what_is_apart_is_let_be(tmp_path: Path) -> None:
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.gguf").touch()
    others = {"model": tmp_path / "model", "data": tmp_path / "data", "base": tmp_path / "a.gguf"}
    for name in ("out", "model-2", "mode", "out/model"):
        require_apart(tmp_path / name, others)
    require_apart(tmp_path / "out", {"model": Path("org/name")})  # on the hub


def test_the_case_of_letters_is_the_systems(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    if not (tmp_path / "MODEL").exists():
        pytest.skip("this file system tells MODEL from model")
    with pytest.raises(ValueError, match="must not be"):
        require_apart(tmp_path / "MODEL" / "out", {"model": tmp_path / "model"})
