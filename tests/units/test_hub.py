"""Models by their names on the hub: from its cache, offline, and with a sentence where they cannot be had."""

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
    """The hub's cache as it lies on a disk, offline: refs name the commit, snapshots link to blobs."""
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


def test_a_model_of_the_hub_has_its_name_there(cache: Path) -> None:
    """Not the commit's, which is the folder's."""
    assert load_model(NAME).name == NAME


def test_the_tokenizer_alone_asks_for_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **more: asked.update(more) or tmp_path)
    write_folder(tmp_path)
    load_tokenizer(NAME)
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_a_name_that_is_not_there_is_one_sentence(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"^someone/other is no folder .* nor to be had") as error:
        load_model("someone/other")
    assert "\n" not in str(error.value)


def test_without_the_extra_the_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'mlx-lora-reference\[hub\]'"):
        load_model(NAME)


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "someone" / "tiny")
    assert find_model(NAME) == Path(NAME)


@pytest.mark.parametrize("name", ["absent", "a/b/c", "./x/y", "some folder/x", "x/y.gguf"])
def test_what_is_no_name_of_the_hub_is_never_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"a model must be a Hugging Face folder or a \.gguf file"):
        load_model(name)
