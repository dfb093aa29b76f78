"""Models by their names on the hub: from its cache, offline; a one-line error if there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.files.checkpoint import load_model, load_tokenizer
from mlx_impl.files.formats.hub import find_model
from tests.tiny_folder import write_folder

NAME, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on disk, offline: refs name the commit, files of a snapshot link to blobs."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for file in sorted(write_folder(snapshot).iterdir()):
        blob = repository / "blobs" / f"blob-of-{file.name}"
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    return tmp_path


def test_a_name_is_found_in_the_cache_without_a_network(cache: Path) -> None:
    assert find_model(NAME) == cache / "models--someone--tiny" / "snapshots" / COMMIT
    assert load_model(NAME).model.config.hidden_size == 32


def test_a_model_from_the_hub_keeps_its_name_on_the_hub(cache: Path) -> None:
    """Not that of its folder, which is the commit."""
    assert load_model(NAME).name == NAME


def test_loading_only_the_tokenizer_downloads_no_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **more: asked.update(more) or tmp_path)
    write_folder(tmp_path)
    load_tokenizer(NAME)
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_a_name_that_the_hub_does_not_have_is_a_one_line_error(cache: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^someone/other is not a local folder or file, and the hub does not give it: "
    ) as error:
        load_model("someone/other")
    assert "\n" not in str(error.value)


def test_without_huggingface_hub_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'mlx-lora-reference\[hub\]'"):
        load_model(NAME)


def test_a_local_folder_of_that_name_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "someone" / "tiny")
    assert find_model(NAME) == Path(NAME)


@pytest.mark.parametrize("name", ["absent", "a/b/c", "./x/y", "some folder/x", "x/y.gguf"])
def test_a_name_that_cannot_be_the_hubs_is_not_looked_up_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"a model must be a Hugging Face folder or a \.gguf file"):
        load_model(name)
