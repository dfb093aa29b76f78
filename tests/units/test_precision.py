"""`dtype`: loading and computing in bfloat16, with adapters that stay float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_impl.__main__ import main
from mlx_impl.cli.settings.config_file import read_config
from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.files.adapters import load_adapter, save_adapter
from mlx_impl.files.checkpoint import load_model, to_numpy
from mlx_impl.files.formats.safetensors import load, loading_bytes, read_folder, tensor_dtypes
from mlx_impl.files.fusing import fuse
from mlx_impl.files.precision import dtype_of
from mlx_impl.lora import lora_parameters
from mlx_impl.run.trainer import LoRATrainer
from tests.derived import within_bfloat16
from tests.tiny_folder import tiny_weights, write_data, write_folder, write_gguf
from tests.units.test_quantized import EVERYTHING, EXAMPLES, quantize_folder

TOKENS = mx.array([[1, 5, 9, 30], [7, 7, 2, 4]])
LONGEST_SUM = 262  # the vocabulary
LORA = LoRAConfig(rank=3, alpha=7.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_folder(tmp_path_factory.mktemp("quantized"), EVERYTHING)


def nearest_in_bfloat16(x: np.ndarray) -> np.ndarray:
    """By hand: the upper half of a float32's bits, ties rounded to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_every_weight_is_the_nearest_number_of_bfloat16(form: str, folder: Path, tmp_path: Path) -> None:
    model = load_model(
        folder if form == "folder" else write_gguf(tmp_path / "m.gguf"), dtype="bfloat16"
    ).model
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.bfloat16}
    assert dtype_of(model) == "bfloat16"
    for name, array in to_numpy(model).items():
        np.testing.assert_array_equal(array, nearest_in_bfloat16(tiny_weights()[name]), err_msg=name)


@pytest.mark.parametrize("dequantize", [False, True])
def test_beside_quantized_weights_everything_is_bfloat16(quantized: Path, dequantize: bool) -> None:
    """Scales and biases too: float16 ones would make the embedding, and all that follows it, float16."""
    exact, model = load_model(quantized).model, load_model(quantized, dequantize, "bfloat16").model
    arrays, logits_BTV = tree_flatten(model.parameters()), model(TOKENS)
    assert {a.dtype for _, a in arrays} == ({mx.bfloat16} if dequantize else {mx.bfloat16, mx.uint32})
    words = {name: np.array(a) for name, a in arrays if a.dtype == mx.uint32}
    stored = load(quantized / "model.safetensors")
    assert all(np.array_equal(array, stored[name]) for name, array in words.items())
    assert logits_BTV.dtype == mx.bfloat16
    expected = np.array(exact(TOKENS), np.float64)
    ours = np.array(logits_BTV.astype(mx.float32))
    verdict = within_bfloat16("logits", ours, expected, LONGEST_SUM)
    assert verdict.used <= 1, verdict.report


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", ["dense", "quantized"])
def test_a_float32_adapter_learns_beside_a_bfloat16_base(
    form: str, use_dora: bool, folder: Path, quantized: Path
) -> None:
    model = load_model(folder if form == "dense" else quantized, dtype="bfloat16").model
    training = TrainConfig(iters=12, batch_size=2, learning_rate=1e-2)
    trainer = LoRATrainer(model, LoRAConfig(rank=3, alpha=7.0, use_dora=use_dora), training)
    digest = trainer.base_digest
    losses = [record.loss_nats for record in trainer.fit(EXAMPLES)]
    assert losses[-1] < losses[0] / 2
    assert {array.dtype for array in lora_parameters(model).values()} == {mx.float32}
    del trainer.base_digest  # so that it is taken again
    assert trainer.base_digest == digest
    assert model(TOKENS).dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "float64", "fp32", "", mx.bfloat16])
def test_any_other_dtype_is_refused(folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype must be 'float32' or 'bfloat16', got .+") as refusal:
        load_model(folder, dtype=dtype)
    assert ("65504" in str(refusal.value)) == (dtype == "float16")


def test_a_weight_that_overflows_bfloat16_is_refused(tmp_path: Path) -> None:
    """The largest float32 rounds to infinity."""
    arrays = load(write_folder(tmp_path) / "model.safetensors")
    arrays["lm_head.weight"][0, 0] = float(np.finfo(np.float32).max)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    load_model(tmp_path)
    with pytest.raises(ValueError, match=r"the tensor 'lm_head.weight' must be finite"):
        load_model(tmp_path, dtype="bfloat16")


def trained_adapter(source: Path, target: Path) -> Path:
    loaded = load_model(source, dtype="bfloat16")
    trainer = LoRATrainer(loaded.model, LORA, TrainConfig(iters=12, batch_size=2, learning_rate=1e-2))
    list(trainer.fit(EXAMPLES))
    save_adapter(loaded.model, LORA, target, "tiny")
    return target


def test_an_adapter_trained_in_bfloat16_is_float32_in_its_file_and_fuses(
    folder: Path, tmp_path: Path
) -> None:
    adapter = trained_adapter(folder, tmp_path / "adapter")
    assert set(tensor_dtypes(adapter / "adapter_model.safetensors").values()) == {mx.float32}
    beside = load_model(folder, dtype="bfloat16").model
    load_adapter(beside, adapter)
    assert {array.dtype for array in lora_parameters(beside).values()} == {mx.float32}
    fuse(load_model(folder), adapter, tmp_path / "fused", dequantize=False)
    fused = np.array(load_model(tmp_path / "fused").model(TOKENS), np.float64)
    ours = np.array(beside(TOKENS).astype(mx.float32))
    verdict = within_bfloat16("logits", ours, fused, LONGEST_SUM)
    assert verdict.used <= 1, verdict.report


def test_a_model_in_bfloat16_is_not_fused(folder: Path, tmp_path: Path) -> None:
    """It would silently lose digits that the base's file has."""
    adapter = trained_adapter(folder, tmp_path / "adapter")
    with pytest.raises(ValueError, match="to be fused must be loaded in float32, got bfloat16"):
        fuse(load_model(folder, dtype="bfloat16"), adapter, tmp_path / "fused", dequantize=False)
    assert not (tmp_path / "fused").exists()


SETTINGS = ["--rank", "2", "--iters", "3", "--batch-size", "2", "--blas", "off", "--json"]


def test_the_commands_compute_in_the_dtype_that_they_are_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train` records it in the run's configuration, but evaluate and generate do not take it from there."""
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    common = ["--model", str(folder), "--adapter-path", str(run), "--blas", "off", "--json"]
    assert main(["train", *common, "--data", str(data), *SETTINGS, "--dtype", "bfloat16"]) == 0
    assert "computing in bfloat16" in capsys.readouterr().err
    assert read_config(run / "config.yaml")["dtype"] == "bfloat16"
    losses = []
    for flags in ([], ["--dtype", "float32"], ["--dtype", "bfloat16"]):
        assert main(["evaluate", *common, "--data", str(data), *flags]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss_nats"])
        assert main(["generate", *common, "--prompt", "x", "--max-tokens", "3", *flags]) == 0
        assert len(json.loads(capsys.readouterr().out)["tokens"]) <= 3
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == pytest.approx(losses[0], rel=2**-8 * LONGEST_SUM**0.5)


def test_the_configuration_of_a_run_in_bfloat16_repeats_it(folder: Path, tmp_path: Path) -> None:
    data, one, two = write_data(tmp_path / "data"), tmp_path / "one", tmp_path / "two"
    command = ["train", "--model", str(folder), "--data", str(data), *SETTINGS, "--dtype", "bfloat16"]
    assert main([*command, "--adapter-path", str(one)]) == 0
    again = ["--adapter-path", str(two), "--blas", "off"]
    assert main(["train", "--config", str(one / "config.yaml"), *again]) == 0
    adapters = [(run / "adapter_model.safetensors").read_bytes() for run in (one, two)]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_float16_is_refused_in_one_sentence_with_the_reason(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And before anything is read: the model's folder is empty."""
    more = ["--prompt", "x"] if command == "generate" else ["--data", str(write_data(tmp_path / "data"))]
    flags = ["--blas", "off", "--dtype", "float16"]
    assert main([command, "--model", str(tmp_path), *more, *flags]) == 2
    *others, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: dtype must be 'float32' or 'bfloat16', got 'float16', whose largest")
    assert not any("error" in line for line in others)


def test_a_folder_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    """The peak is the result and one tensor more; never all tensors as stored, which are twice as large."""
    stored = {f"model.layers.{n}.mlp.up_proj.weight": mx.full((512, 512), n, mx.float32) for n in range(16)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), stored)
    a_tensor = stored.popitem()[1].nbytes
    del stored
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    weights = read_folder(tmp_path, mx.bfloat16)
    peak = mx.get_peak_memory() - before
    assert len(weights) == 16 and 8 * a_tensor < peak <= loading_bytes(tmp_path, mx.bfloat16) < 11 * a_tensor
