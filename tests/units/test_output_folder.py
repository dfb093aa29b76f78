"""The output folder: new or empty, and without overlap with an input."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_impl.disk.output_folder import free_folder, is_empty, require_new_folder, require_no_overlap


def test_a_folder_with_only_file_browser_files_is_empty(tmp_path: Path) -> None:
    assert is_empty(tmp_path)
    for name in (".DS_Store", "._.DS_Store", ".localized", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_text("junk")
    assert is_empty(tmp_path)
    (tmp_path / "._folder").mkdir()
    assert not is_empty(tmp_path)
    assert not is_empty(tmp_path / "nothing")


def test_a_link_with_a_file_browsers_name_counts(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").symlink_to("elsewhere")
    assert not is_empty(tmp_path)


def test_free_folder_finds_the_first_free_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_folder_that_is_not_empty_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(
        ValueError, match=f"^{tmp_path}: must be a new or an empty folder, such as {tmp_path}-2$"
    ):
        require_new_folder(tmp_path)


@pytest.mark.parametrize(
    ("save", "other", "free"),
    [
        ("model", "model", "model-2"),  # the same folder
        ("", "model", None),  # contains the input
        ("deep", "deep/er/file.gguf", "deep-2"),
        ("model/out", "model", "out"),  # lies inside the input
        ("model/new/out", "model", "out"),
        ("link/out", "model", "out"),  # through a link
        ("model/out", "link", "out"),
        ("model/../model/out", "model", "out"),
        ("link", "model", "link-2"),
    ],
)
def test_an_output_folder_that_overlaps_with_an_input_is_refused(
    tmp_path: Path, save: str, other: str, free: str | None
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").touch()
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "file.gguf").touch()
    path, read = tmp_path / save, tmp_path / other
    with pytest.raises(ValueError, match="must not be, contain or lie inside the model") as caught:
        require_no_overlap(path, {"model": read})
    sentence = f"the output folder {path} must not be, contain or lie inside the model {read}: choose another"
    assert str(caught.value).startswith(sentence)
    assert free is None or str(caught.value).endswith(f", such as {tmp_path / free}")


def test_separate_folders_are_accepted(tmp_path: Path) -> None:
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.gguf").touch()
    others = {"model": tmp_path / "model", "data": tmp_path / "data", "base": tmp_path / "a.gguf"}
    for name in ("out", "model-2", "mode", "out/model"):
        require_no_overlap(tmp_path / name, others)
    require_no_overlap(tmp_path / "out", {"model": Path("org/name")})  # a model on the hub


def test_overlap_respects_a_file_system_that_ignores_case(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    if not (tmp_path / "MODEL").exists():
        pytest.skip("this file system tells MODEL from model")
    with pytest.raises(ValueError, match="must not be"):
        require_no_overlap(tmp_path / "MODEL" / "out", {"model": tmp_path / "model"})
