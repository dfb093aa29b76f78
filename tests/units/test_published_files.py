"""Files as they are published: read where nothing is changed, else refused in one clear sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.formats.hf_config import read_config
from tests.tiny_folder import write_folder

HARMLESS: list[dict[str, Any]] = [
    {"hidden_act": "swish"},
    {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    {"_flash_attn_2_enabled": True},
]


@pytest.mark.parametrize("change", HARMLESS, ids=str)
def test_another_name_or_a_dropout_of_zero_changes_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    write_folder(tmp_path / "one")
    write_folder(tmp_path / "other", **change)
    assert read_config(tmp_path / "other") == read_config(tmp_path / "one")


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"embd_pdrop": 0.1}], ids=str)
def test_what_changes_the_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_folder(tmp_path, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        read_config(tmp_path)


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    write_folder(tmp_path)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(ValueError, match="must be the file itself, but is a Git LFS pointer"):
        load_model(tmp_path)
