"""The tensors of a folder: one file or several shards; a wrong index or a damaged tensor is named."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.files.checkpoint import load_model, to_numpy
from mlx_impl.files.formats.safetensors import INDEX, read_folder
from tests.tiny_folder import tiny_weights, write_folder

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shards(folder: Path) -> dict[str, str]:
    """The tiny model in two files, tensors alternating; returns the weight map."""
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {name: (FIRST, SECOND)[n % 2] for n, name in enumerate(sorted(tiny_weights()))}
    for file in (FIRST, SECOND):
        arrays = {n: mx.array(w) for n, w in tiny_weights().items() if weight_map[n] == file}
        mx.save_safetensors(str(folder / file), arrays)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_give_the_whole_model(tmp_path: Path) -> None:
    write_shards(tmp_path)
    weights = to_numpy(load_model(tmp_path).model)
    assert weights.keys() == tiny_weights().keys()
    assert all(np.array_equal(weights[name], weight) for name, weight in tiny_weights().items())


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    """Mistral's folders hold the weights once more, under other names."""
    write_shards(tmp_path)
    mx.save_safetensors(
        str(tmp_path / "consolidated.safetensors"), {"tok_embeddings.weight": mx.zeros((2, 3))}
    )
    load_model(tmp_path)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_read_exactly(tmp_path: Path, dtype: mx.Dtype) -> None:
    write_folder(tmp_path)
    halves = {name: mx.array(weight).astype(dtype) for name, weight in tiny_weights().items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), halves)
    weights = to_numpy(load_model(tmp_path).model)
    assert all(np.array_equal(weights[name], np.array(h.astype(mx.float32))) for name, h in halves.items())


ELSEWHERE = ["../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", 7, "x.bin"]


@pytest.mark.parametrize("file", ELSEWHERE)
def test_an_index_that_points_out_of_the_folder_is_refused(tmp_path: Path, file: object) -> None:
    weight_map = write_shards(tmp_path)
    write_index(tmp_path, {**weight_map, "lm_head.weight": file})
    with pytest.raises(ValueError, match="weight_map must name safetensors files of this folder, got"):
        load_model(tmp_path)


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    """In the hub's cache every file of a snapshot is such a link."""
    write_shards(tmp_path / "snapshot")
    (tmp_path / "snapshot" / FIRST).rename(tmp_path / "blob")
    (tmp_path / "snapshot" / FIRST).symlink_to(tmp_path / "blob")
    load_model(tmp_path / "snapshot")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(ValueError, match=f"{SECOND}: there is no such safetensors file"):
        load_model(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    other = {FIRST: SECOND, SECOND: FIRST}[weight_map["lm_head.weight"]]
    write_index(tmp_path, {**weight_map, "lm_head.weight": other})
    with pytest.raises(
        ValueError, match=rf"must hold the tensor lm_head\.weight, as {INDEX} says, but does not"
    ):
        load_model(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    arrays = mx.load(str(tmp_path / SECOND)) | {
        "lm_head.weight": mx.zeros((2,)),
        "model.norm.weight": mx.zeros((2,)),
    }
    mx.save_safetensors(str(tmp_path / SECOND), arrays)
    with pytest.raises(ValueError, match="is also in another file of the folder"):
        load_model(tmp_path)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    weights = {name: mx.array(weight) for name, weight in tiny_weights().items()}
    weights["model.norm.weight"][3] = mx.nan
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' must be finite, got infinity or NaN"):
        load_model(tmp_path)


def test_the_rope_constants_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    write_folder(tmp_path)
    weights = {name: mx.array(weight) for name, weight in tiny_weights().items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones((4,))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    assert read_folder(tmp_path).keys() == tiny_weights().keys()
