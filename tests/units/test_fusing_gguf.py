"""GGUF files of fused models: this project's reader gives the bits of the fused folder back."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.__main__ import main
from mlx_impl.config import LoRAConfig, ModelConfig, RopeScaling
from mlx_impl.files.checkpoint import load_model, to_numpy
from mlx_impl.files.formats.gguf_file import read_container
from mlx_impl.files.fusing import fuse
from mlx_impl.files.fusing_gguf import fuse_to_gguf
from tests.gguf_files import LLAMA, GGMLType, random_weights, write_family
from tests.nightly import mostly_at_night
from tests.tiny_folder import TEMPLATE, TOKENS, permute, write_folder
from tests.units.test_fusing import write_adapter
from tests.units.test_quantized import quantize_folder

SPEC = replace(LLAMA, vocab_size=len(TOKENS) + 4)  # with embeddings that no token has, as Qwen's models
QWEN2 = replace(SPEC, qkv_bias=True, hidden_size=SPEC.num_attention_heads * SPEC.head_dim)
LORA = LoRAConfig(rank=3, alpha=5.0, target_modules=("q_proj", "k_proj", "down_proj"))
Model = tuple[str, ModelConfig, dict[str, Any]]  # model_type, configuration, more keys of config.json
MODELS: dict[str, Model] = {
    "llama3-rope": (
        "llama",
        replace(SPEC, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 32.0)),
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "qwen2-tied": ("qwen2", replace(QWEN2, tie_word_embeddings=True), {}),
    "qwen3": ("qwen3", replace(SPEC, qk_norm=True, rope_theta=1e6), {}),
    "mistral": ("mistral", replace(SPEC, sliding_window=3), {"sliding_window": 3}),
    "llama": ("llama", SPEC, {}),
    "linear-rope": (
        "llama",
        replace(SPEC, rope_scaling=RopeScaling("linear", 2.5)),
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    ),
    "qwen2": ("qwen2", QWEN2, {}),
}
REFUSED: dict[str, Model] = MODELS | {
    "qwen2-narrow": ("qwen2", replace(QWEN2, hidden_size=30), {}),
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}  # as Qwen has it
INPUT = mx.array([[5, 6, 7, 8, 9, 10], [20, 9, 10, 11, 12, 1]])


def write_model(folder: Path, name: str, dtype: mx.Dtype = mx.float32) -> Path:
    family, spec, more = REFUSED[name]
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    fields += ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    write_folder(folder, model_type=family, **{f: getattr(spec, f) for f in fields}, **more)
    weights = {n: mx.array(a).astype(dtype) for n, a in random_weights(spec).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def require_same_model(one: Path, other: Path) -> None:
    """Configuration, weights, logits and tokens, to the bit."""
    a, b = load_model(one), load_model(other)
    assert a.model.config == b.model.config
    ours, theirs = to_numpy(a.model), to_numpy(b.model)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n].tobytes() != theirs[n].tobytes()] == []
    assert mx.array_equal(a.model(INPUT), b.model(INPUT))
    chat = [{"role": "user", "content": "yes, Zoë: it's 1234\n\n"}]
    assert a.tokenizer.encode_prompt(chat) == b.tokenizer.encode_prompt(chat)
    assert a.tokenizer.encode_text("yes") == b.tokenizer.encode_text("yes")
    assert a.tokenizer.stop_ids == b.tokenizer.stop_ids


@pytest.mark.parametrize("name", mostly_at_night(MODELS, 4))
def test_a_written_file_reads_back_as_the_fused_folder_to_the_bit(tmp_path: Path, name: str) -> None:
    base = write_model(tmp_path / "base", name)
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)
    survival = fuse_to_gguf(load_model(base), adapter, tmp_path / "new" / "fused.gguf", dequantize=False)
    assert fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False) == survival
    require_same_model(tmp_path / "new" / "fused.gguf", tmp_path / "fused")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_matrices_keep_the_bases_dtype_and_vectors_are_float32(tmp_path: Path, dtype: mx.Dtype) -> None:
    base = write_model(tmp_path / "base", "qwen2", dtype)
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)
    fuse_to_gguf(load_model(base), adapter, tmp_path / "fused.gguf", dequantize=False)
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False)
    require_same_model(tmp_path / "fused.gguf", tmp_path / "fused")
    metadata, tensors = read_container(tmp_path / "fused.gguf")
    kinds = {len(tensor.shape): tensor.type for tensor in tensors.values()}
    half = GGMLType.F16 if dtype == mx.float16 else GGMLType.BF16
    assert kinds == {1: GGMLType.F32, 2: half}
    assert metadata["general.file_type"] == {GGMLType.F16: 1, GGMLType.BF16: 32}[half]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_rounds_the_fused_weights_once(tmp_path: Path, dtype: str) -> None:
    base = write_model(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)
    fuse(load_model(base), adapter, tmp_path / "exact", dequantize=False)
    arguments = ["--model", str(base), "--adapter-path", str(adapter), "--gguf", str(tmp_path / "x.gguf")]
    assert main(["fuse", *arguments, "--gguf-dtype", dtype, "--blas", "off"]) == 0
    exact, written = (to_numpy(load_model(tmp_path / name).model) for name in ("exact", "x.gguf"))
    for name, weight in exact.items():
        kind = getattr(mx, dtype if weight.ndim == 2 else "float32")
        assert np.array_equal(written[name], np.array(mx.array(weight).astype(kind).astype(mx.float32)))


@pytest.mark.parametrize("family", mostly_at_night(["llama-with-biases", "llama", "qwen3"], 1))
def test_a_gguf_base_keeps_its_metadata(tmp_path: Path, family: str) -> None:
    base = write_family(tmp_path / "base.gguf", family)
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)
    fuse_to_gguf(load_model(base), adapter, tmp_path / "fused.gguf", dequantize=False)
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize=False)
    require_same_model(tmp_path / "fused.gguf", tmp_path / "fused")
    before, after = (read_container(tmp_path / f"{name}.gguf")[0] for name in ("base", "fused"))
    assert after == before | {"general.name": "fused", "general.file_type": 0}


def test_rope_factors_are_those_of_the_published_rule(tmp_path: Path) -> None:
    """Llama 3.2's: short waves are kept, those beyond 8192 positions are divided by 32, some are blended."""
    base = write_model(tmp_path / "base", "llama3-rope")
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)
    fuse_to_gguf(load_model(base), adapter, tmp_path / "fused.gguf", dequantize=False)
    waves = 2 * np.pi * 5e5 ** (np.arange(0, SPEC.head_dim, 2) / SPEC.head_dim)
    kept = (8192 / waves - 1) / 3
    blended = 1 / ((1 - kept) / 32 + kept)
    expected = np.where(waves < 8192 / 4, 1, np.where(waves > 8192, 32, blended))
    factors = read_container(tmp_path / "fused.gguf")[1]["rope_freqs.weight"].data.view(np.float32)
    assert np.allclose(factors, expected, rtol=1e-6) and {1, 32} <= {*factors.tolist()}


def test_rows_of_queries_and_keys_have_llama_cpps_order(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", config=replace(LORA, target_modules=("o_proj",)))
    fuse_to_gguf(load_model(base), adapter, tmp_path / "fused.gguf", dequantize=False)
    tensors, weights = read_container(tmp_path / "fused.gguf")[1], random_weights(SPEC)
    for part, heads in (("q", SPEC.num_attention_heads), ("k", SPEC.num_key_value_heads)):
        stored = tensors[f"blk.1.attn_{part}.weight"].data.view(np.float32)
        weight = weights[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert np.array_equal(stored.reshape(weight.shape), permute(weight, heads))


def test_a_quantized_base_is_written_unquantized_or_refused(tmp_path: Path) -> None:
    base = quantize_folder(tmp_path / "base", {"proj": 4, "embed_tokens": 4})
    adapter = write_adapter(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="cannot hold MLX-quantized weights: give --dequantize"):
        fuse_to_gguf(load_model(base), adapter, tmp_path / "fused.gguf", dequantize=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    fuse_to_gguf(load_model(base), adapter, tmp_path / "fused.gguf", dequantize=True)
    fuse(load_model(base), adapter, tmp_path / "fused", dequantize=True)
    ours, theirs = (to_numpy(load_model(tmp_path / name).model) for name in ("fused.gguf", "fused"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("qwen3", WINDOW, "a sliding window of qwen3 cannot be written to a GGUF file, got 4 tokens"),
        ("qwen2-narrow", {}, "of qwen2 must be hidden_size to be written to a GGUF file, got 60 and 30"),
        ("llama", {"max_position_embeddings": 2**64}, "_length cannot be written to a GGUF file, got 18"),
        ("qwen2", MODELS["llama3-rope"][2], "type llama3 cannot be written to a GGUF file of qwen2"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_express_is_refused(
    tmp_path: Path, model: str, change: dict[str, Any], message: str
) -> None:
    base = write_model(tmp_path / "base", model)
    config = json.loads((base / "config.json").read_text()) | change
    (base / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)
    with pytest.raises(ValueError, match=message):
        fuse_to_gguf(load_model(base), adapter, tmp_path / "fused.gguf", dequantize=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_update_that_overflows_float16_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", 1e6, LORA)
    with pytest.raises(ValueError, match=r"must be finite, and that of model\.layers\.\d\..* is not in"):
        fuse_to_gguf(load_model(base), adapter, tmp_path / "x.gguf", False, "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gguf", "there.gguf"], "there.gguf: is there already: give the name of a new file"),
        (["--gguf", "base"], "base: the name of a GGUF file must end in .gguf"),
        (["--gguf", "x.gguf", "--save-path", "new"], "--save-path: not allowed with argument --gguf"),
        (["--save-path", "new", "--gguf-dtype", "float16"], "--gguf-dtype is for --gguf FILE"),
        ([], "one of the arguments --save-path --gguf is required"),
    ],
)
def test_no_file_is_overwritten_and_wrong_flags_are_refused(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_model(Path("base"), "llama")
    write_adapter(base, Path("adapter"), config=LORA)
    Path("there.gguf").write_text("mine")
    words = ["fuse", "--model", "base", "--adapter-path", "adapter", *arguments, "--blas", "off"]
    with suppress(SystemExit):  # argparse's own
        assert main(words) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "there.gguf"]
    assert Path("there.gguf").read_text() == "mine"


def test_a_full_disk_is_a_one_line_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NumPy's error has neither a number nor the file's name."""
    base, file = write_model(tmp_path / "base", "llama"), tmp_path / "x.gguf"
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)

    def full(*_: Any) -> None:
        raise OSError("1800 requested and 432 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    arguments = ["--model", str(base), "--adapter-path", str(adapter), "--gguf", str(file), "--blas", "off"]
    assert main(["fuse", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {file}: no space is left for it") and error.endswith("432 written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_adapters_chat_template_replaces_the_models(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", config=LORA)
    own = TEMPLATE.replace("assistant", "helper")
    (adapter / "chat_template.jinja").write_text(own)
    fuse_to_gguf(load_model(base), adapter, tmp_path / "fused.gguf", dequantize=False)
    assert read_container(tmp_path / "fused.gguf")[0]["tokenizer.chat_template"] == own
