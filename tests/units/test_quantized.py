"""MLX-quantized folders: weights stay quantized in loading and training, or are dequantized on request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl import lora
from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Example
from mlx_impl.files.checkpoint import load_model, to_numpy
from mlx_impl.run import merging
from mlx_impl.run.trainer import LoRATrainer
from tests.derived import compare
from tests.tiny_folder import tiny_weights, write_folder

GROUP = 32
EXAMPLES = [
    Example((4, 9, 30, 7, 2), (False, False, True, True, True)),
    Example((5, 6, 2), (False, True, True)),
]


def quantize_folder(folder: Path, widths: dict[str, int], **settings: Any) -> Path:
    """The tiny model as mlx-lm stores it; `widths` gives the bits of weights by the ends of their names."""
    write_folder(folder)
    arrays: dict[str, mx.array] = {}
    for name, weight in tiny_weights().items():
        module = name.removesuffix(".weight")
        width = next((b for end, b in widths.items() if module.endswith(end)), None)
        if width is None:
            arrays[name] = mx.array(weight).astype(mx.float16)
        else:
            parts = mx.quantize(mx.array(weight).astype(mx.float16), GROUP, width)
            arrays |= dict(zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": GROUP, "bits": 4, **settings}
    config["quantization_config"] = config["quantization"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dequantized(folder: Path, name: str, bits: int) -> np.ndarray:
    """scale * q + bias by hand: q is read from a row's bits, lowest bit of the first word first."""
    arrays = mx.load(str(folder / "model.safetensors"))
    words, scales, biases = (np.array(arrays[f"{name}.{part}"]) for part in ("weight", "scales", "biases"))
    row_bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    q = row_bits.reshape(len(words), -1, bits) @ (1 << np.arange(bits))
    groups = q.reshape(len(words), -1, GROUP) * scales[..., None].astype(np.float64) + biases[..., None]
    return groups.reshape(len(words), -1)


EVERYTHING = {"proj": 4, "embed_tokens": 4, "lm_head": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_folder(tmp_path_factory.mktemp("quantized"), EVERYTHING)


def test_quantized_weights_stay_quantized(folder: Path) -> None:
    model = load_model(folder).model
    kinds = {type(module) for _, module in model.named_modules() if "weight" in module}
    assert {nn.QuantizedLinear, nn.QuantizedEmbedding} <= kinds and nn.Linear not in kinds


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_weights_are_those_of_the_documented_layout(tmp_path: Path, bits: int) -> None:
    folder = quantize_folder(tmp_path, dict.fromkeys(EVERYTHING, bits), bits=bits)
    weights = to_numpy(load_model(folder).model)
    for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj", "lm_head"):
        expected = dequantized(folder, name, bits)
        assert compare(name, weights[f"{name}.weight"], expected.astype(np.float32), expected, 2).used <= 1


def test_modules_may_have_their_own_settings_or_stay_plain(tmp_path: Path) -> None:
    widths = {"1.mlp.down_proj": 8, "proj": 4}
    own = {"model.layers.1.mlp.down_proj": {"group_size": GROUP, "bits": 8}}
    folder = quantize_folder(tmp_path, widths, **own, **{"lm_head": False, "model.embed_tokens": False})
    model = load_model(folder).model
    projections: list[Any] = [layer.mlp.down_proj for layer in model.model.layers]
    assert [projection.bits for projection in projections] == [4, 8]
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


def test_a_dequantized_model_has_the_same_logits_from_plain_linears(folder: Path) -> None:
    tokens = mx.array([[1, 5, 9, 30], [7, 7, 2, 4]])
    quantized, plain = load_model(folder).model, load_model(folder, dequantize=True).model
    assert not any(isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for m in plain.modules())
    ours, whole = np.array(quantized(tokens)), np.array(plain(tokens))
    verdict = compare("logits", ours, whole, whole.astype(np.float64), 262)
    assert verdict.used <= 1, verdict.report


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_trains_beside_quantized_weights_that_do_not_change(folder: Path, use_dora: bool) -> None:
    model = load_model(folder).model
    base = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    config = LoRAConfig(rank=3, alpha=7.0, use_dora=use_dora)
    trainer = LoRATrainer(model, config, TrainConfig(iters=12, batch_size=2, learning_rate=1e-2))
    losses = [record.loss_nats for record in trainer.fit(EXAMPLES)]
    assert losses[-1] < losses[0] / 2
    names = {f"{n}.lora_b" for n in lora.lora_layers(model)}
    assert all(np.array(lora.lora_parameters(model)[name]).any() for name in names)
    after = {n.replace(".linear.", "."): np.array(a) for n, a in tree_flatten(model.parameters())}
    assert all(np.array_equal(array, after[name]) for name, array in base.items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_training_equals_training_beside_the_dequantized_weights(folder: Path, use_dora: bool) -> None:
    """The factors after three updates are the same, so the gradients were."""
    factors = []
    for dequantize in (False, True):
        model = load_model(folder, dequantize).model
        config = LoRAConfig(rank=3, alpha=7.0, use_dora=use_dora)
        trainer = LoRATrainer(model, config, TrainConfig(iters=3, batch_size=2, optimizer="sgd"))
        list(trainer.fit(EXAMPLES))
        factors.append({n: np.array(a) for n, a in lora.lora_parameters(model).items()})
    for name, ours in factors[0].items():
        expected = factors[1][name]
        verdict = compare(name, ours, expected, expected.astype(np.float64), 262)
        assert verdict.used <= 1, verdict.report


def test_merging_into_a_quantized_base_keeps_the_logits(folder: Path) -> None:
    model, tokens = load_model(folder).model, mx.array([[1, 5, 9, 30], [7, 7, 2, 4]])
    lora.add_lora(model, LoRAConfig(rank=3, alpha=7.0))
    for layer in lora.lora_layers(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=0.1, key=mx.random.key(1))
    before = np.array(model(tokens))
    merging.merge(model)
    merged = np.array(model(tokens))
    assert compare("logits", merged, before, before.astype(np.float64), 262).used <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "mxfp4"}, "the mode of quantization must be affine, got 'mxfp4'"),
        ({"lm_head": {"mode": "nvfp4"}}, "the mode of quantization of lm_head must be affine, got 'nvfp4'"),
        ({"quant_method": "gptq"}, "quantization must be MLX's, which has no key quant_method, got 'gptq'"),
        ({"bits": "4"}, "bits must be a whole number, got '4'"),
        ({"bits": 7}, "cannot be quantized with 7 bits in groups of 32: "),
        ({"group_size": 48}, "cannot be quantized with 4 bits in groups of 48: "),
        ({"lm_head": False}, "quantization says that lm_head is not quantized, but its weights are"),
        ({"bits": 8}, r"must have the shape \(\d+, \d+\), got"),
    ],
)
def test_an_unsupported_or_wrong_quantization_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(quantize_folder(tmp_path, EVERYTHING, **settings))


def test_quantized_weights_that_the_configuration_does_not_describe_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    write_folder(tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path)
    with pytest.raises(
        ValueError, match=r"has no key quantization, but the weights of lm_head are quantized"
    ):
        load_model(tmp_path)
