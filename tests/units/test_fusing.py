"""Fused folders: the adapter's logits, the base's dtypes and bits, and the update's survival by hand."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.__main__ import main
from mlx_impl.config import LoRAConfig
from mlx_impl.disk.folders import atomic_folder
from mlx_impl.files.adapters import load_adapter, save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.files.formats import hf_folder
from mlx_impl.files.fusing import Survival, fuse
from mlx_impl.lora import add_lora, lora_parameters
from mlx_impl.model import CausalLM
from tests.derived import UNIT_ROUNDOFF, within
from tests.tiny_folder import write_folder, write_gguf
from tests.units.test_quantized import GROUP, quantize_folder

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])
LORA = LoRAConfig(rank=3, alpha=5.0, target_modules=("k_proj", "down_proj"))
FOUR_BITS = {"proj": 4, "embed_tokens": 4}
SIZES = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def write_adapter(base: Path, folder: Path, size: float = 0.3, config: LoRAConfig = LORA) -> Path:
    model = load_model(base).model
    add_lora(model, config)
    rng = np.random.default_rng(0)
    factors = {n: size**0.5 * rng.standard_normal(a.shape) for n, a in lora_parameters(model).items()}
    factors = {n: np.abs(a) + 1 if a.ndim == 1 else a for n, a in factors.items()}
    model.load_weights([(n, mx.array(a.astype("f"))) for n, a in factors.items()], strict=False)
    folder.mkdir()
    save_adapter(model, config, folder, "tiny")
    return folder


def write_base(folder: Path, dtype: mx.Dtype = mx.float32) -> Path:
    path = str(write_folder(folder) / "model.safetensors")
    mx.save_safetensors(path, {name: array.astype(dtype) for name, array in dict(mx.load(path)).items()})
    return folder


def with_adapter(base: Path, adapter: Path) -> CausalLM:
    model = load_model(base).model
    load_adapter(model, adapter)
    return model.eval()


def stored(folder: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        arrays |= mx.load(str(file))
    return arrays


def assert_logits(folder: Path, base: Path, adapter: Path, unit: float = UNIT_ROUNDOFF) -> None:
    ours = np.array(load_model(folder).model(TOKENS))
    verdict = within("logits", ours, np.array(with_adapter(base, adapter)(TOKENS)), 0.0, 64)
    assert verdict.used <= unit / UNIT_ROUNDOFF, verdict.report


def deltas(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """scale * (A B)^T in float64."""
    factors = lora_parameters(with_adapter(base, adapter))
    names = {name.rpartition(".")[0] for name in factors}
    scale = LORA.alpha / LORA.rank
    return {
        name: scale
        * (np.array(factors[f"{name}.lora_a"], "f8") @ np.array(factors[f"{name}.lora_b"], "f8")).T
        for name in names
    }


def survival_by_hand(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> tuple[float, float]:
    g, w = (np.concatenate([arrays[n].ravel() for n in sorted(wanted)]) for arrays in (got, wanted))
    return float(g @ w / (w @ w)), float(np.linalg.norm(g - w) / np.linalg.norm(w))


@pytest.mark.parametrize("config", [LORA, LoRAConfig(rank=3, use_dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", SIZES)
def test_a_fused_folder_has_the_adapters_logits_in_the_bases_type(
    tmp_path: Path, dtype: mx.Dtype, config: LoRAConfig
) -> None:
    base = write_base(tmp_path / "base", dtype)
    adapter = write_adapter(base, tmp_path / "adapter", config=config)
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False)
    assert_logits(tmp_path / "fused", base, adapter, SIZES[dtype])
    before, after = stored(base), stored(tmp_path / "fused")
    assert after.keys() == before.keys()
    assert {array.dtype for array in after.values()} == {dtype}
    if config is LORA:
        changed = {name for name in before if not mx.array_equal(before[name], after[name])}
        assert changed == {f"{name}.weight" for name in deltas(base, adapter)}


@pytest.mark.parametrize(("dtype", "size"), [(mx.bfloat16, 0.3), (mx.bfloat16, 1e-3), (mx.float16, 1e-3)])
def test_the_survival_of_the_update_equals_one_computed_by_hand(
    tmp_path: Path, dtype: mx.Dtype, size: float
) -> None:
    base = write_base(tmp_path / "base", dtype)
    adapter = write_adapter(base, tmp_path / "adapter", size)
    survival = fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False)
    wanted, before, after = deltas(base, adapter), stored(base), stored(tmp_path / "fused")
    got = {
        name: np.array(after[f"{name}.weight"].astype(mx.float32), "f8")
        - np.array(before[f"{name}.weight"].astype(mx.float32), "f8")
        for name in wanted
    }
    survived, error = survival_by_hand(got, wanted)
    assert survival.survived == pytest.approx(survived, rel=1e-4)
    assert survival.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(("size", "little"), [(1.0, False), (1e-3, True)])
def test_into_a_quantized_base_the_bits_stay_and_a_small_update_does_not(
    tmp_path: Path, size: float, little: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    base = quantize_folder(tmp_path / "base", FOUR_BITS)
    adapter, fused = write_adapter(base, tmp_path / "adapter", size), tmp_path / "fused"
    arguments = ["fuse", "--model", str(base), "--adapter-path", str(adapter), "--save-path", str(fused)]
    assert main([*arguments, "--json", "--blas", "off"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert ("little of the update survived" in printed.err) is little
    assert ("fuse with --dequantize" in printed.err) is little
    before, after, wanted = stored(base), stored(fused), deltas(base, adapter)
    kinds = {name: (array.dtype, array.shape) for name, array in before.items()}
    assert {name: (array.dtype, array.shape) for name, array in after.items()} == kinds
    assert json.loads((fused / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    got = {name: dequantized(after, name) - dequantized(before, name) for name in wanted}
    survived, error = survival_by_hand(got, wanted)
    assert result["survived"] == pytest.approx(survived, rel=1e-4)
    assert result["error"] == pytest.approx(error, rel=1e-4)
    assert (error > 0.5) is little
    same = {name for name in before if name.rpartition(".")[0] not in wanted}
    assert all(mx.array_equal(before[name], after[name]) for name in same)


def dequantized(arrays: dict[str, mx.array], name: str) -> np.ndarray:
    """scale * q + bias, with q read from a row's bits four at a time, the lowest of a word first."""
    words, scales, biases = (np.array(arrays[f"{name}.{part}"]) for part in ("weight", "scales", "biases"))
    q = (words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(len(words), -1, GROUP)
    return (q * scales[..., None].astype("f8") + biases[..., None]).reshape(len(words), -1)


def test_with_dequantize_the_update_survives_and_nothing_is_quantized(tmp_path: Path) -> None:
    base = quantize_folder(tmp_path / "base", FOUR_BITS)
    adapter = write_adapter(base, tmp_path / "adapter")
    survival = fuse(load_model(base), adapter, tmp_path / "fused", dequantize=True)
    assert survival.error < 0.01
    assert_logits(tmp_path / "fused", base, adapter, SIZES[mx.float16])
    assert stored(tmp_path / "fused").keys() == stored(write_folder(tmp_path / "plain")).keys()
    assert {array.dtype for array in stored(tmp_path / "fused").values()} == {mx.float16}
    assert "quantization" not in (tmp_path / "fused" / "config.json").read_text()


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_second_copy_of_a_tied_embedding_is_left_out(tmp_path: Path, dequantize: bool) -> None:
    base = quantize_folder(tmp_path / "base", {**FOUR_BITS, "lm_head": 4})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    adapter = write_adapter(base, tmp_path / "adapter")
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize)
    heads = [{n for n in stored(folder) if "lm_head" in n} for folder in (base, tmp_path / "fused")]
    assert len(heads[0]) == 3 and not heads[1]
    assert load_model(tmp_path / "fused").model(TOKENS).shape == (2, 4, config["vocab_size"])


def test_a_gguf_base_becomes_a_folder_in_float32_with_its_tokenizer(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "tiny.gguf")
    adapter = write_adapter(base, tmp_path / "adapter")
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False)
    assert_logits(tmp_path / "fused", base, adapter)
    ours, theirs = load_model(tmp_path / "fused"), load_model(base)
    assert ours.model.config == theirs.model.config
    messages = [{"role": "user", "content": "yes, Zoë: 1234"}]
    assert ours.tokenizer.encode_prompt(messages) == theirs.tokenizer.encode_prompt(messages)
    assert ours.tokenizer.eos_id == theirs.tokenizer.eos_id


def test_large_models_are_written_in_shards_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a base in one file, and from one in shards, with the tensors split between them anywhere."""
    monkeypatch.setattr(hf_folder, "MAX_SHARD_BYTES", 5_000)
    base = quantize_folder(tmp_path / "base", FOUR_BITS)
    adapter, whole = write_adapter(base, tmp_path / "adapter"), load_model(base)
    fuse(whole, adapter, tmp_path / "fused", dequantize=False)
    index = json.loads((tmp_path / "fused" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "fused").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    arrays = stored(tmp_path / "fused")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert arrays.keys() == index["weight_map"].keys() == stored(base).keys()
    fuse(load_model(tmp_path / "fused"), adapter, tmp_path / "twice", dequantize=True)
    assert load_model(tmp_path / "twice").model(TOKENS).shape == (2, 4, whole.model.config.vocab_size)


def test_tokenizer_and_licence_files_are_copied_and_code_is_not(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for name in ("generation_config.json", "chat_template.jinja", "LICENSE", "modeling.py", "other.bin"):
        (base / name).write_text("{}")
    adapter = write_adapter(base, tmp_path / "adapter")
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False)
    assert {path.name for path in (tmp_path / "fused").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("generation_config.json", "chat_template.jinja", "LICENSE"),
    }


def test_an_update_that_overflows_half_precision_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", mx.float16)
    adapter = write_adapter(base, tmp_path / "adapter", 1e6)
    with pytest.raises(ValueError, match=r"must be finite, and that of model\.layers\.\d\..* is not in"):
        fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_without_an_update_survival_is_complete() -> None:
    assert (Survival().survived, Survival().error) == (1.0, 0.0)


def test_the_models_own_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    before = {path: path.read_bytes() for path in base.iterdir()}
    arguments = ["fuse", "--model", str(base), "--adapter-path", str(adapter), "--save-path", str(base)]
    assert main([*arguments, "--blas", "off"]) == 2
    assert (
        f"the output folder {base} must not be, contain or lie inside the model {base}"
        in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("size", [1e30, 1e38])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_an_update_whose_survival_overflows_is_refused(
    tmp_path: Path, size: float, is_quantized: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The update is finite in float32, but its square is not."""
    base = quantize_folder(tmp_path / "base", FOUR_BITS) if is_quantized else write_base(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", size / 1e2)
    arguments = ["--adapter-path", str(adapter), "--save-path", str(tmp_path / "fused"), "--dequantize"]
    assert (
        main(["fuse", "--model", str(base), *arguments[: 4 if not is_quantized else 5], "--blas", "off"]) == 2
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert ("the update is too large to be fused" in error and "|dW|^2 = inf" in error) or (
        is_quantized and "must be finite" in error  # its scales are in float16
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("where", ["base/out", "adapter/out", "adapter", ".", "link/out", "base/../adapter"])
@pytest.mark.parametrize("command", ["fuse", "convert"])
def test_the_output_folder_must_not_overlap_with_the_inputs(
    tmp_path: Path, command: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    (tmp_path / "link").symlink_to("adapter")
    before = sorted(tmp_path.rglob("*"))
    arguments = [command, "--adapter-path", str(adapter), "--save-path", f"{tmp_path}/{where}"]
    arguments += ["--model", str(base), "--blas", "off"] if command == "fuse" else ["--to", "mlx-lm"]
    if command == "convert" and where == "base/out":
        assert main(arguments) == 0  # convert reads no model
        return
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "must not be, contain or lie inside the " in error and "choose another, such as " in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["fuse", "convert"])
def test_a_full_disk_is_a_one_line_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")

    def full(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    arguments = [command, "--adapter-path", str(adapter), "--save-path", str(tmp_path / "out")]
    arguments += ["--model", str(base), "--blas", "off"] if command == "fuse" else ["--to", "mlx-lm"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'out'}") and last.endswith("No space left on device")
    assert ".part" not in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="enough"), atomic_folder(tmp_path / "a" / "b") as part:
        part.file("x").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
        raise ValueError("enough")
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "a" / "b").mkdir()
    with atomic_folder(tmp_path / "a" / "b") as part:
        part.file("x").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x").read_text() == "x"
    with pytest.raises(ValueError, match="must be a new or an empty folder"), atomic_folder(tmp_path / "a"):
        pass


def test_for_an_update_lost_in_half_precision_the_advice_is_not_to_dequantize(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", mx.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter", 1e-5)
    arguments = ["--adapter-path", str(adapter), "--save-path", str(tmp_path / "fused")]
    assert main(["fuse", "--model", str(base), *arguments, "--blas", "off"]) == 0
    warning = capsys.readouterr().err
    assert "to have it whole, keep the adapter beside the model" in warning
    assert "--dequantize" not in warning


def test_a_fused_folder_says_the_rope_where_every_program_looks(tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters` alone; others read `rope_theta` and `rope_scaling`."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 40}
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    left_out = ("rope_theta", "rope_scaling", "head_dim", "tie_word_embeddings")
    config = {key: value for key, value in config.items() if key not in left_out}
    config["rope_parameters"] = {**llama3, "rope_theta": 500.0}
    (base / "config.json").write_text(json.dumps(config))
    fuse(load_model(base), write_adapter(base, tmp_path / "adapter"), tmp_path / "fused", dequantize=False)
    written = json.loads((tmp_path / "fused" / "config.json").read_text())
    more = {"rope_theta": 500.0, "rope_scaling": llama3, "head_dim": 8, "tie_word_embeddings": False}
    assert written == config | more
