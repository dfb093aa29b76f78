"""PEFT's adapter files: names, shapes and keys; saved adapters load again; what does not fit is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.config import LoRAConfig
from mlx_impl.files.adapters import load_adapter, save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.lora import add_lora, lora_parameters
from mlx_impl.model import CausalLM
from tests.tiny_folder import write_folder

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


def adapted(base: Path, config: LoRAConfig) -> CausalLM:
    """The tiny model with an adapter whose B is not zero."""
    model = load_model(base).model
    add_lora(model, config)
    rng = np.random.default_rng(0)
    model.load_weights(
        [(n, mx.array(rng.standard_normal(a.shape).astype("f"))) for n, a in lora_parameters(model).items()],
        strict=False,
    )
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=3, alpha=5.0, dropout=0.1),
        LoRAConfig(rank=2, alpha=7.0, target_modules=("v_proj", "down_proj"), num_layers=1),
        LoRAConfig(rank=3, alpha=5.0, use_rslora=True, rank_pattern={"q_proj": 2}),
        LoRAConfig(rank=3, alpha=5.0, use_dora=True, alpha_pattern={r"0\.mlp\.\w+": 3.0}),
        LoRAConfig(rank=2, target_modules=r".*\.1\..*[kv]_proj"),
        LoRAConfig(rank=2, target_modules="all-linear"),
    ],
    ids=["all", "two targets in the last layer", "rslora", "dora", "regex", "all-linear"],
)
def test_a_saved_adapter_loads_bit_for_bit(base: Path, tmp_path: Path, config: LoRAConfig) -> None:
    """The logits and the configuration are the same."""
    model = adapted(base, config)
    save_adapter(model, config, tmp_path, "tiny")
    again = load_model(base).model
    loaded = load_adapter(again, tmp_path)
    if isinstance(config.target_modules, tuple):
        config = replace(config, target_modules=tuple(sorted(config.target_modules)))
    assert loaded == config
    model.eval()
    again.eval()
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))


def test_the_files_have_pefts_names_and_shapes(base: Path, tmp_path: Path) -> None:
    """Keys `base_model.model.<module>.lora_A.weight`; A is (rank, in), B (out, rank); no scale is stored."""
    config = LoRAConfig(rank=3, alpha=5.0, target_modules=("k_proj",), num_layers=1)
    model = adapted(base, config)
    save_adapter(model, config, tmp_path, "tiny")
    tensors, metadata = mx.load(str(tmp_path / "adapter_model.safetensors"), return_metadata=True)
    stem = "base_model.model.model.layers.1.self_attn.k_proj"
    assert {name: array.shape for name, array in tensors.items()} == {
        f"{stem}.lora_A.weight": (3, 32),
        f"{stem}.lora_B.weight": (16, 3),
    }
    ours = lora_parameters(model)["model.layers.1.self_attn.k_proj.lora_b"]
    np.testing.assert_array_equal(np.array(tensors[f"{stem}.lora_B.weight"]).T, np.array(ours))
    assert metadata == {"format": "pt"}
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 3,
        "lora_alpha": 5.0,
        "target_modules": ["k_proj"],
        "layers_to_transform": [1],
        "bias": "none",
        "inference_mode": True,
    }
    assert {key: record[key] for key in expected} == expected


@pytest.mark.parametrize(
    "other",
    [
        LoRAConfig(rank=2, alpha=4.0, alpha_pattern={"q_proj": 3.0, r"0\.self_attn\.q_proj": 5.0}),
        LoRAConfig(rank=2, alpha=8.0, alpha_pattern={r"0\.self_attn\.q_proj": 5.0, "q_proj": 3.0}),
    ],
    ids=["order of the patterns", "alpha"],
)
def test_a_configuration_that_is_not_the_models_is_refused(
    base: Path, tmp_path: Path, other: LoRAConfig
) -> None:
    """Its file would say another scale than that which the factors were trained with."""
    config = LoRAConfig(rank=2, alpha=4.0, alpha_pattern={r"0\.self_attn\.q_proj": 5.0, "q_proj": 3.0})
    with pytest.raises(ValueError, match="configuration must be that of the model's adapter, LoRAConfig"):
        save_adapter(adapted(base, config), other, tmp_path / "adapter", "tiny")
    assert not (tmp_path / "adapter").exists()


def test_saving_leaves_no_temporary_file(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    save_adapter(adapted(base, LoRAConfig()), LoRAConfig(), folder, "tiny")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def rewrite(folder: Path, change: dict[str, mx.array | None]) -> None:
    path = str(folder / "adapter_model.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    tensors = {n: a for n, a in {**tensors, **change}.items() if a is not None}
    mx.save_safetensors(path, tensors)


def test_an_expression_for_some_layers_is_saved_as_names(base: Path, tmp_path: Path) -> None:
    """PEFT refuses an expression beside a list of layers."""
    config = LoRAConfig(rank=2, target_modules="all-linear", num_layers=1)
    model = adapted(base, config)
    save_adapter(model, config, tmp_path, "tiny")
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["layers_to_transform"] is None
    assert len(record["target_modules"]) == 7
    assert all(name.startswith("model.layers.1.") for name in record["target_modules"])
    again = load_model(base).model
    load_adapter(again, tmp_path)
    assert lora_parameters(again).keys() == lora_parameters(model).keys()


A_KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A_KEY: None}, "up_proj.lora_A.weight is missing"),
        ({"base_model.model.x.lora_A.weight": mx.zeros((8, 32))}, "x.lora_A.weight has no place"),
        ({A_KEY: mx.zeros((32, 8))}, r"must have the shape \(8, 32\), got \(32, 8\)"),
    ],
    ids=["missing", "misnamed", "transposed"],
)
def test_a_tensor_that_does_not_fit_is_named(
    base: Path, tmp_path: Path, change: dict[str, mx.array | None], message: str
) -> None:
    """PEFT would only warn, and the adapter might do nothing."""
    save_adapter(adapted(base, LoRAConfig()), LoRAConfig(), tmp_path, "tiny")
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(load_model(base).model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"use_dora": "yes"}, "use_dora must be true or false, got 'yes'"),
        ({"rank_pattern": {"q_proj": 4}}, r"q_proj.lora_A.weight must have the shape \(4, 32\)"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\['q_proj'\] must be a whole number, got 1.5"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern must be an object, got \['q_proj'\]"),
        ({"target_modules": "(", "layers_to_transform": None}, r"'\(' must be a regular expression"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights is not supported, got 'pissa': it changed",
        ),
        ({"exclude_modules": ["o_proj"]}, "o_proj.lora_A.weight has no place in this model"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"lora_alpha": float("inf")}, "alpha must be finite and positive, got inf"),
        ({"layers_to_transform": 1}, "layers.0.mlp.down_proj.lora_A.weight has no place"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"target_modules": 3}, "target_modules must be a list of names or a regular expression, got 3"),
        ({"target_modules": ["w1"]}, "target modules must be among .*q_proj.*, got w1"),
        ({"layers_to_transform": [0]}, "layers.1.mlp.down_proj.lora_A.weight has no place"),
        ({"r": "8"}, "adapter_config.json: rank must be a whole number, got '8'"),
    ],
)
def test_an_unsupported_configuration_is_an_error(
    base: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save_adapter(adapted(base, LoRAConfig()), LoRAConfig(), tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_adapter(load_model(base).model, tmp_path)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_an_adapter_in_half_precision_is_loaded_as_float32(
    base: Path, tmp_path: Path, dtype: mx.Dtype
) -> None:
    """In float16 AdamW's epsilon would be zero."""
    save_adapter(adapted(base, LoRAConfig()), LoRAConfig(), tmp_path, "tiny")
    tensors = mx.load(str(tmp_path / "adapter_model.safetensors"))
    rewrite(tmp_path, {name: array.astype(dtype) for name, array in tensors.items()})
    model = load_model(base).model
    load_adapter(model, tmp_path)
    assert {array.dtype for array in lora_parameters(model).values()} == {mx.float32}


def test_an_adapter_of_integers_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(base, LoRAConfig()), LoRAConfig(), tmp_path, "tiny")
    rewrite(tmp_path, {A_KEY: mx.zeros((8, 32), dtype=mx.int32)})
    with pytest.raises(ValueError, match=r"up_proj\.lora_A\.weight' must be of floats, got mlx\.core\.int32"):
        load_adapter(load_model(base).model, tmp_path)
