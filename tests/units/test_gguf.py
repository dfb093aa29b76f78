"""Reading GGUF files: three families bit for bit; what is unsupported or does not fit is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlx_impl.config import ModelConfig, RopeScaling
from mlx_impl.files.checkpoint import load_model, to_numpy
from mlx_impl.files.formats import gguf as ours
from mlx_impl.files.formats.gguf import read_gguf
from mlx_impl.files.formats.gguf_file import StoredTensor, read_container
from tests.gguf_files import FAMILIES, LLAMA, GGMLType, random_weights, write_family

LONG = replace(LLAMA, head_dim=16, rope_theta=500000.0)  # some frequencies kept, some blended, some divided
WIDE = replace(LLAMA, intermediate_size=256)  # the longest block of a quantized type is of 256 values
DOWN = "blk.1.ffn_down.weight"
# fmt: off
DEQUANTIZED = [
    getattr(GGMLType, name)
    for name in (
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
        "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
        "TQ1_0", "TQ2_0", "MXFP4",
    )
]
# fmt: on


def test_the_container_holds_what_the_gguf_package_reads(tmp_path: Path) -> None:
    """Every key, and every tensor's type, shape and bytes."""
    path = write_family(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": np.ones(5, np.float32)})
    metadata, tensors = read_container(path)
    reader = gguf.GGUFReader(path)
    expected = {name: field.contents() for name, field in reader.fields.items()}
    assert metadata == {name: value for name, value in expected.items() if not name.startswith("GGUF.")}
    assert tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        ours = tensors[tensor.name]
        assert (ours.type, ours.shape[::-1]) == (tensor.tensor_type, tuple(tensor.shape.tolist()))
        assert ours.data.tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_its_configuration_and_weights_bit_for_bit(tmp_path: Path, family: str) -> None:
    """llama's rows of Q and K, weights and biases, return from llama.cpp's order; Qwen's stay as they are."""
    spec = FAMILIES[family][1]
    config, weights, _ = read_gguf(write_family(tmp_path / "tiny.gguf", family))
    assert config == spec
    assert weights.keys() == random_weights(spec).keys()
    for name, expected in random_weights(spec).items():
        np.testing.assert_array_equal(weights[name], expected, err_msg=name)


@pytest.mark.parametrize("part", [1, 100, 10**6])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
def test_a_tensor_is_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch, kind: str, part: int) -> None:
    """PART_BYTES at a time, to the bit as the `gguf` package dequantizes the whole."""
    monkeypatch.setattr(ours, "PART_BYTES", part)
    type_, shape = gguf.GGMLQuantizationType[kind], (7, 3, 64)
    numbers = np.random.default_rng(1).standard_normal(shape, np.float32)
    data = gguf.quants.quantize(numbers, type_).view(np.uint8)
    expected = gguf.quants.dequantize(data, type_).reshape(shape)
    np.testing.assert_array_equal(ours.dequantize("x", StoredTensor(type_, shape, data)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_as_a_model(tmp_path: Path, family: str) -> None:
    model = load_model(write_family(tmp_path / "tiny.gguf", family)).model
    assert to_numpy(model).keys() == random_weights(FAMILIES[family][1]).keys()


def test_the_default_head_dimension_is_width_divided_by_heads(tmp_path: Path) -> None:
    spec = replace(LLAMA, hidden_size=36, head_dim=6)
    change = dict.fromkeys(("llama.attention.key_length", "llama.attention.value_length"))
    assert read_gguf(write_family(tmp_path / "tiny.gguf", change=change, spec=spec))[0] == spec


def llama3_factors(spec: ModelConfig, factor: float, original: int = 8192) -> np.ndarray:
    """Llama 3.1's published rule: 1 below original / 4, `factor` above original, blended between."""
    factors = []
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    for wavelength in (
        np.float32(2 * math.pi) * np.float32(spec.rope_theta) ** exponents
    ):  # as llama.cpp's script
        smooth = (np.float32(original) / wavelength - 1) / 3
        blended = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wavelength < original / 4 else factor if wavelength > original else blended)
    return np.array(factors, np.float32)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_stored_factors_of_llama_3_are_recognized(tmp_path: Path, factor: float, head_dim: int) -> None:
    spec = replace(LONG, head_dim=head_dim)
    factors_P = llama3_factors(spec, factor)
    assert len(set(factors_P.tolist())) >= 3
    path = write_family(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": factors_P}, spec=spec)
    assert read_gguf(path)[0] == replace(spec, rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, 8192))


@pytest.mark.parametrize(
    ("factors_P", "message"),
    [
        (llama3_factors(LONG, 8.0, original=4096), "rope_freqs.weight must follow Llama 3.1's rule"),
        (np.linspace(1, 8, 8, dtype=np.float32), "rope_freqs.weight must follow Llama 3.1's rule"),
        (
            llama3_factors(LONG, 8.0) * np.linspace(1.0001, 1, 8, dtype=np.float32),
            "must follow Llama 3.1's rule",
        ),
        (np.ones(7, np.float32), r"rope_freqs.weight must have 8 values, got the shape \(7,\)"),
        (np.full(8, np.nan, np.float32), "rope_freqs.weight must be finite"),
    ],
)
def test_other_stored_factors_are_refused(tmp_path: Path, factors_P: np.ndarray, message: str) -> None:
    path = write_family(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": factors_P}, spec=LONG)
    with pytest.raises(ValueError, match=message):
        read_gguf(path)


@pytest.mark.parametrize("kind", ["linear", None])
def test_linear_rope_scaling_may_be_given_by_its_factor_alone(tmp_path: Path, kind: str | None) -> None:
    """llama.cpp reads a factor without a type as linear."""
    change = {"qwen3.rope.scaling.type": kind, "qwen3.rope.scaling.factor": 4.0}
    config, _, _ = read_gguf(write_family(tmp_path / "tiny.gguf", "qwen3", change))
    assert config.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize(("stored", "window"), [(5, 5), (0, None)])
def test_mistrals_sliding_window_is_read(tmp_path: Path, stored: int, window: int | None) -> None:
    change = {"llama.attention.sliding_window": stored}
    assert read_gguf(write_family(tmp_path / "tiny.gguf", change=change))[0].sliding_window == window


def test_a_sliding_window_in_some_layers_is_refused(tmp_path: Path) -> None:
    path = write_family(tmp_path / "tiny.gguf", "qwen2", change={"qwen2.attention.sliding_window": 5})
    with pytest.raises(ValueError, match=r"qwen2\.attention\.sliding_window is not supported, got 5"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.expert_count": 8}, "'llama.expert_count' is not supported, got 8"),
        (
            {"llama.rope.dimension_count": 4},
            "llama.rope.dimension_count must be the head dimension 10, got 4",
        ),
        ({"llama.attention.value_length": 12}, "llama.attention.value_length must be the head dimension 10"),
        ({"llama.attention.scale": 0.5}, "'llama.attention.scale' is not supported, got 0.5"),
        ({"llama.logit_scale": 16.0}, "'llama.logit_scale' is not supported, got 16.0"),
        ({"llama.final_logit_softcapping": 30.0}, "'llama.final_logit_softcapping' is not supported, got 30"),
        ({"llama.attention.causal": False}, "'llama.attention.causal' is not supported, got False"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type must be none or linear, got 'yarn'"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, "scaling.factor contradicts"),
        ({"llama.a_key_of_tomorrow": "x"}, "'llama.a_key_of_tomorrow' is not supported, got 'x'"),
        ({"llama.vocab_size": 64}, "llama.vocab_size must be the number of tokens, 61, got 64"),
        ({"llama.attention.head_count": None}, "it lacks the key 'llama.attention.head_count'"),
        (
            {"llama.attention.head_count": "six"},
            "head_count must be a whole number and at least 1, got 'six'",
        ),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, "num_key_value_heads must be a whole number, got"),
        (
            {"llama.attention.head_count_kv": 3},
            r"blk.0.attn_k.weight must have the shape \(30, 30\), got \(20",
        ),
        ({"llama.block_count": 4}, "the tensor blk.3.attn_norm.weight is missing"),
        ({"llama.block_count": 2}, "the tensor 'blk.2.attn_k.weight' has no place in this model"),
        (
            {"llama.feed_forward_length": 40},
            r"ffn_down.weight must have the shape \(30, 40\), got \(30, 44\)",
        ),
        ({"split.count": 3}, "the model must be in one file, got one of 3 parts: merge them first"),
        ({"general.type": "adapter"}, "general.type must be model, got 'adapter'"),
        ({"tokenizer.ggml.tokens": 7}, "tokenizer.ggml.tokens must be an array, got 7"),
    ],
)
def test_unsupported_or_wrong_metadata_is_an_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Nothing is silently approximated: the error gives the key, the rule and the value."""
    with pytest.raises(ValueError, match=rf"tiny\.gguf: .*{message}"):
        read_gguf(write_family(tmp_path / "tiny.gguf", change=change))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.2.attn_v.weight": None}, "the tensor blk.2.attn_v.weight is missing"),
        ({"token_embd.weight": None}, "the tensor token_embd.weight is missing"),
        ({"blk.0.ffn_gate_inp.weight": np.ones((3, 30), np.float32)}, "ffn_gate_inp.weight' has no place"),
        ({"blk.0.attn_output.bias": np.ones(30, np.float32)}, "'blk.0.attn_output.bias' has no place"),
        (
            {DOWN: np.ones((44, 30), np.float32)},
            r"ffn_down.weight must have the shape \(30, 44\), got \(44, 30\)",
        ),
        (
            {DOWN: np.full((30, 44), np.inf, np.float32)},
            "ffn_down.weight must be finite, and 1320 values are not",
        ),
        (
            {DOWN: np.ones((30, 44), np.int32)},
            "ffn_down.weight is of type I32, which the gguf package does not",
        ),
        (
            {DOWN: np.ones((30, 44), np.float64)},
            "ffn_down.weight is of type F64, which the gguf package does not",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, tensors: dict[str, np.ndarray | None], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"tiny\.gguf: .*{message}"):
        read_gguf(write_family(tmp_path / "tiny.gguf", tensors=tensors))


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_every_type_that_the_gguf_package_dequantizes_is_read(tmp_path: Path, kind: GGMLType) -> None:
    """Blocks of random bytes, all below 64, so that every scale is finite."""
    rng = np.random.default_rng(int(kind))
    block = rng.integers(0, 64, gguf.quant_shape_to_byte_shape((30, 256), kind), dtype=np.uint8)
    path = write_family(tmp_path / "tiny.gguf", tensors={DOWN: block}, types={DOWN: kind}, spec=WIDE)
    weight = read_gguf(path)[1]["model.layers.1.mlp.down_proj.weight"]
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, gguf.quants.dequantize(block, kind))


def test_a_q4_0_weight_is_the_scale_times_its_nibble_minus_8(tmp_path: Path) -> None:
    """32 values: a float16 scale, the low nibbles of 16 bytes, then the high ones."""
    bytes_16 = np.arange(16, dtype=np.uint8) | np.arange(15, -1, -1, dtype=np.uint8) << 4
    block = np.concatenate([np.array([0.5], np.float16).view(np.uint8), bytes_16])
    path = write_family(
        tmp_path / "tiny.gguf",
        tensors={DOWN: np.tile(block, (30, 8))},
        types={DOWN: GGMLType.Q4_0},
        spec=WIDE,
    )
    weight = read_gguf(path)[1]["model.layers.1.mlp.down_proj.weight"]
    expected = np.concatenate([np.arange(-8, 8), np.arange(7, -9, -1)]) / 2
    np.testing.assert_array_equal(weight, np.tile(expected, (30, 8)))
