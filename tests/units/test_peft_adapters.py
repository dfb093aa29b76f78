"""PEFT's adapters in every honest form are read, and what cannot be is refused with what would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.config import LoRAConfig
from mlx_impl.files.adapters import load_adapter, save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.formats.peft_targets import is_adapted
from mlx_impl.lora import add_lora, lora_layers
from tests.tiny_folder import write_folder

FILE = "adapter_model.safetensors"
LAYERS = {"target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


def write(base: Path, folder: Path, linears: list[str], **record: Any) -> Path:
    """An adapter of these linears, of layer and path, whose record says it in PEFT's way."""
    model = load_model(base).model
    config = LoRAConfig(rank=2, target_modules=tuple(f"model.layers.{name}" for name in linears))
    add_lora(model, config)
    for layer in lora_layers(model).values():
        layer.lora_b = mx.array(np.random.default_rng(1).standard_normal(layer.lora_b.shape).astype("f"))
    save_adapter(model, config, folder, "org/base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **record}))
    return folder


def adapted(base: Path, folder: Path) -> list[str]:
    """The linears that the loaded adapter adapts; it is loaded again as it is saved again."""
    model = load_model(base).model
    config = load_adapter(model, folder)
    save_adapter(model, config, folder / "again", "org/base")
    again = load_model(base).model
    load_adapter(again, folder / "again")
    tokens = mx.array([[5, 6, 7]])
    model.eval()
    again.eval()
    np.testing.assert_array_equal(model(tokens), again(tokens))
    return sorted(name.removeprefix("model.layers.") for name in lora_layers(model))


Q, U = "self_attn.q_proj", "mlp.up_proj"
CHOICES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "a number": ([f"0.{Q}", f"0.{U}"], {**LAYERS, "layers_to_transform": 0}),
    "the last as a number": ([f"1.{Q}", f"1.{U}"], {**LAYERS, "layers_to_transform": 1}),
    "a list that is not the tail": ([f"0.{Q}", f"0.{U}"], {**LAYERS, "layers_to_transform": [0]}),
    "in another order": (
        [f"{n}.{x}" for n in (0, 1) for x in (Q, U)],
        {**LAYERS, "layers_to_transform": [1, 0]},
    ),
    "more than there are": ([f"1.{Q}", f"1.{U}"], {**LAYERS, "layers_to_transform": [1, 2, 3]}),
    "no layer listed is all": (
        [f"{n}.{Q}" for n in (0, 1)],
        {"target_modules": ["q_proj"], "layers_to_transform": []},
    ),
    "a pattern": ([f"0.{Q}", f"0.{U}"], {**LAYERS, "layers_to_transform": [0], "layers_pattern": "layers"}),
    "patterns": (
        [f"1.{Q}", f"1.{U}"],
        {**LAYERS, "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
    ),
    "an empty pattern": ([f"0.{Q}", f"0.{U}"], {**LAYERS, "layers_to_transform": 0, "layers_pattern": []}),
    "names left out": ([f"{n}.{Q}" for n in (0, 1)], {**LAYERS, "exclude_modules": ["up_proj"]}),
    "a name left out": (
        [f"0.{U}", f"1.{Q}", f"1.{U}"],
        {**LAYERS, "exclude_modules": [f"model.layers.0.{Q}"]},
    ),
    "an expression left out": (
        [f"0.{Q}", f"1.{Q}"],
        {"target_modules": "all-linear", "exclude_modules": r".*(mlp|[kvo]_proj).*"},
    ),
    "both": ([f"0.{U}"], {**LAYERS, "layers_to_transform": [0], "exclude_modules": ["q_proj"]}),
    "a name that matches nothing": ([f"0.{Q}", f"1.{Q}"], {"target_modules": ["q_proj", "w_pack"]}),
    "patterns that match nothing": (
        [f"0.{Q}"],
        {"target_modules": [f"model.layers.0.{Q}"], "rank_pattern": {"w": 9}, "alpha_pattern": {"w": 9}},
    ),
}


@pytest.mark.parametrize(("linears", "record"), CHOICES.values(), ids=CHOICES)
def test_the_linears_that_peft_would_adapt_are_adapted(
    base: Path, tmp_path: Path, linears: list[str], record: dict[str, Any]
) -> None:
    folder = write(base, tmp_path / "a", linears, **{"layers_to_transform": None, **record})
    assert adapted(base, folder) == sorted(linears)


HARMLESS: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "unsloth_fixed": None,
    "some_new_option": False,
    "another": "",
    "and_another": [],
    "fan_in_fan_out": True,
    "ensure_weight_tying": True,
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "kpm"},
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": {"direction": "ArB2r"},
    "velora_config": {"num_groups": 4},
    "runtime_config": {"ephemeral_gpu_offload": False},
    "modules_to_save": [],
    "task_type": None,
}


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_options_that_change_nothing_of_a_trained_adapter_are_read(
    base: Path, tmp_path: Path, start: object
) -> None:
    folder = write(base, tmp_path / "a", [f"0.{Q}"], **HARMLESS, init_lora_weights=start)
    assert adapted(base, folder) == [f"0.{Q}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "got 'pissa_niter_4': .*path_initial_model"),
        ({"init_lora_weights": "olora"}, "got 'olora': it changed the base's weights"),
        ({"init_lora_weights": "corda"}, "got 'corda': it changed the base's weights"),
        ({"init_lora_weights": "lora_ga"}, "got 'lora_ga': it changed the base's weights"),
        ({"init_lora_weights": "loftq"}, "got 'loftq': merge it into its base"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save .* got \['lm_head'\]: .*merge_and_unload"),
        ({"target_modules": ["q_proj", "lm_head"]}, "an adapter of lm_head is .*merge_and_unload"),
        ({"target_modules": r".*q_proj|.*embed_tokens"}, "an adapter of embed_tokens is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is .*rows of the embedding"),
        ({"bias": "lora_only"}, "bias is .* got 'lora_only': it holds trained biases"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is not supported"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is not supported"),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config is not supported"),
        ({"alora_invocation_tokens": [4, 5]}, "acts on a part of each text .*: use it with PEFT"),
        ({"arrow_config": {"top_k": 3}}, "routes between several adapters"),
        ({"megatron_config": {"x": 1}}, "megatron_config is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"target_parameters": ["experts.up_proj"]}, "target_parameters is not supported"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be a number or a list of numbers"),
        ({"layers_to_transform": 0, "layers_pattern": 3}, "layers_pattern must be a name or a list of names"),
        ({"exclude_modules": 7}, "exclude_modules must be a list of names or a regular expression, got 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changes_more_than_linears_is_refused_with_what_would_do(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write(base, tmp_path / "a", [f"0.{Q}", f"1.{Q}"], **{"target_modules": ["q_proj"], **change})
    with pytest.raises(ValueError, match=message):
        load_adapter(load_model(base).model, folder)


def renamed(folder: Path, rename: Any) -> None:
    tensors = dict(mx.load(str(folder / FILE)))
    mx.eval(tensors)
    mx.save_safetensors(str(folder / FILE), {rename(name): array for name, array in tensors.items()})


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".my_adapter.weight"),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    ],
    ids=["default", "another name", "compiled", "checkpointed"],
)
def test_keys_with_the_adapters_name_or_a_wrapper_are_read(base: Path, tmp_path: Path, rename: Any) -> None:
    folder = write(base, tmp_path / "a", [f"0.{Q}"])
    renamed(folder, rename)
    assert adapted(base, folder) == [f"0.{Q}"]


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_a_magnitude_is_read_under_each_name_that_peft_gave_it(
    base: Path, tmp_path: Path, suffix: str
) -> None:
    model = load_model(base).model
    config = LoRAConfig(rank=2, target_modules=("q_proj",), use_dora=True)
    add_lora(model, config)
    save_adapter(model, config, tmp_path / "a", "org/base")
    renamed(tmp_path / "a", lambda name: name.replace("magnitude_vector", f"magnitude_vector{suffix}"))
    assert adapted(base, tmp_path / "a") == [f"0.{Q}", f"1.{Q}"]


def test_two_adapters_in_a_file_are_refused(base: Path, tmp_path: Path) -> None:
    folder = write(base, tmp_path / "a", [f"0.{Q}"])
    tensors = dict(mx.load(str(folder / FILE)))
    mx.eval(tensors)
    more = {name.replace(".weight", ".other.weight"): array for name, array in tensors.items()}
    mx.save_safetensors(str(folder / FILE), {**tensors, **more})
    with pytest.raises(ValueError, match=r"must hold one adapter, and has several tensors .*lora_"):
        load_adapter(load_model(base).model, folder)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.lora_embedding_A", "x.y.weight"])
def test_a_tensor_that_is_no_factor_says_what_would_do(base: Path, tmp_path: Path, name: str) -> None:
    """PEFT saves a resized embedding by itself."""
    folder = write(base, tmp_path / "a", [f"0.{Q}"])
    tensors = dict(mx.load(str(folder / FILE)))
    mx.eval(tensors)
    mx.save_safetensors(str(folder / FILE), {**tensors, f"base_model.model.{name}": mx.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"is not part of a LoRA adapter of linears: .*merge_and_unload"):
        load_adapter(load_model(base).model, folder)


def test_an_adapter_for_another_model_says_which_base_it_was_made_for(base: Path, tmp_path: Path) -> None:
    folder = write(base, tmp_path / "a", [f"0.{Q}"])
    wide = write_folder(tmp_path / "wide", num_hidden_layers=2)
    renamed(folder, lambda name: name.replace("q_proj", "k_proj"))
    with pytest.raises(ValueError, match=r"; the adapter was made for org/base\Z"):
        load_adapter(load_model(wide).model, folder)


def test_a_pickled_adapter_says_what_would_do(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"save its pickle adapter_model\.bin anew with PEFT"):
        load_adapter(load_model(base).model, tmp_path)


def test_a_pattern_for_a_linear_that_is_not_adapted_is_ignored(base: Path, tmp_path: Path) -> None:
    """As in PEFT."""
    patterns = {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"v_proj": 32}}
    folder = write(base, tmp_path / "a", [f"0.{Q}", f"1.{Q}"], target_modules=["q_proj"], **patterns)
    assert adapted(base, folder) == [f"0.{Q}", f"1.{Q}"]


@pytest.mark.parametrize(
    "record", [{"layers_to_transform": [7]}, {"exclude_modules": ["q_proj"]}], ids=["layer", "excluded"]
)
def test_a_record_that_adapts_nothing_is_refused(base: Path, tmp_path: Path, record: dict[str, Any]) -> None:
    folder = write(base, tmp_path / "a", [f"0.{Q}", f"1.{Q}"], target_modules=["q_proj"], **record)
    with pytest.raises(ValueError, match="must leave a linear of this model, and leave none"):
        load_adapter(load_model(base).model, folder)


def test_all_linear_leaves_out_what_is_outside_the_blocks() -> None:
    assert not is_adapted("lm_head", {"target_modules": "All-Linear"})
    assert is_adapted("model.layers.0.mlp.up_proj", {"target_modules": "All-Linear"})
