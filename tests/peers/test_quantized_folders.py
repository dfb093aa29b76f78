"""Folders that mlx-lm quantizes stay quantized, and equal PyTorch on weights dequantized by NumPy.

A row of a weight is split into groups; in a group w = scale * q + bias, with q of `bits` bits. The q of a row
form one stream of bits, lowest bit first, in little-endian uint32 words (MLX documentation,
`mlx.core.quantize`). `dequantized` reads that without MLX.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import torch

from mlx_impl import load_model
from mlx_impl.config import LoRAConfig
from tests.derived import compare
from tests.peers.cases import Arrays
from tests.peers.families import (
    LLAMA3_ROPE,
    VOCAB_SIZE,
    Family,
    FolderTwin,
    use_transformers_4_keys,
    write_family,
    write_tokenizer,
)
from tests.peers.folder_trainer import (
    assert_equal_to_peft,
    batch_of,
    greedy_answers,
    load,
    longest_sum,
)

PLAIN = LoRAConfig(rank=3, alpha=7.0)
DORA = LoRAConfig(rank=2, alpha=5.0, use_dora=True)
# Every number of columns is a multiple of 64; 6 heads * 32 is not the width.
WIDE = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "head_dim": 32,
    "num_hidden_layers": 2,
}
TIED = {"tie_word_embeddings": True}
BF16, FP16 = torch.bfloat16, torch.float16


def mixed(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """As mlx-lm's recipes for mixed bits: some layers in more bits, some in fewer, some not quantized."""
    if "layers.0.mlp.down_proj" in path:
        return {"group_size": 32, "bits": 6}
    if path.endswith("v_proj"):
        return {"group_size": 64, "bits": 8}
    return "layers.1.self_attn.k_proj" not in path and "embed_tokens" not in path


@dataclass(frozen=True)
class Quantized:
    """A family's checkpoint, and how mlx-lm quantizes it."""

    family: Family
    group_size: int = 64
    bits: int = 4
    predicate: Callable[[str, nn.Module], bool | dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # more entries of "quantization"


def llama(**more: Any) -> Family:
    dtype = more.pop("dtype", torch.float32)
    return Family("Llama", WIDE | {"rope_parameters": LLAMA3_ROPE} | more, dtype)


CASES = {
    **{f"llama-{bits}-bits": Quantized(llama(), 64, bits) for bits in (2, 3, 4, 5, 6, 8)},
    "llama-groups-of-32-tied-bf16": Quantized(llama(**TIED, dtype=BF16), 32, 4),
    "llama-groups-of-32-of-3-bits-fp16": Quantized(llama(dtype=FP16), 32, 3),
    "llama-mixed": Quantized(llama(), 64, 4, mixed),
    "llama-mixed-tied-says-false": Quantized(
        llama(**TIED), 64, 4, mixed, {"model.embed_tokens": False, "model.layers.1.self_attn.k_proj": False}
    ),
    "mistral-window": Quantized(Family("Mistral", WIDE | {"sliding_window": 4}), 32, 5),
    "qwen2-bf16": Quantized(Family("Qwen2", {"hidden_size": 192, "intermediate_size": 320}, BF16), 32, 8),
    "qwen2-tied": Quantized(Family("Qwen2", {"hidden_size": 192, "intermediate_size": 320} | TIED), 64, 4),
    "qwen3-tied-fp16": Quantized(Family("Qwen3", WIDE | TIED, FP16), 64, 6),
}
# mlx-lm computes in the dtype of the scales, and does not read Mistral's window (see below).
IN_FLOAT32 = [n for n, c in CASES.items() if c.family.dtype == torch.float32 and c.family.kind != "Mistral"]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def write_quantized(folder: Path, case: Quantized, mode: str = "affine") -> Path:
    """Write what `mlx_lm.convert --quantize` writes, with the functions that it calls."""
    source = use_transformers_4_keys(write_family(folder / "source", case.family))
    model, config = mlx_lm.utils.load_model(source, lazy=False)
    group_size, bits = (case.group_size, case.bits) if mode == "affine" else (None, None)
    model, config = mlx_lm.utils.quantize_model(
        model, config, group_size, bits, mode, quant_predicate=case.predicate
    )
    config["quantization"] |= case.extra
    target = folder / "quantized"
    mlx_lm.utils.save_model(target, model)
    mlx_lm.utils.save_config(config, target / "config.json")
    return write_tokenizer(target)


def dequantized(words_OW: np.ndarray, scales_OG: np.ndarray, biases_OG: np.ndarray, bits: int) -> np.ndarray:
    """scale * q + bias, in float64."""
    stream = np.unpackbits(words_OW.astype("<u4").view(np.uint8), axis=1, bitorder="little")
    q_OI = stream.reshape(len(words_OW), -1, bits) @ 2.0 ** np.arange(bits)
    q_OGI = q_OI.reshape(*scales_OG.shape, -1)
    return (scales_OG[..., None] * q_OGI + biases_OG[..., None]).reshape(q_OI.shape)


def dense_weights(folder: Path) -> Arrays:
    """Every weight of a folder, dequantized, in float64."""
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    weights: Arrays = {}
    for name in {n for n in tensors if not n.endswith((".scales", ".biases"))}:
        module = name.removesuffix(".weight")
        if f"{module}.scales" in tensors:
            own = quantization.get(module) or quantization
            scales, biases = (as_float32(tensors[f"{module}.{part}"]) for part in ("scales", "biases"))
            weights[name] = dequantized(np.array(tensors[name]), scales, biases, own["bits"])
        else:
            weights[name] = as_float32(tensors[name]).astype(np.float64)
    return weights


def as_float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def quantized_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {n: (m.group_size, m.bits) for n, m in model.named_modules() if isinstance(m, kinds)}


@every_case
def test_a_quantized_base_stays_quantized_and_equals_pytorch_on_its_weights(
    tmp_path: Path, case: Quantized
) -> None:
    folder = write_quantized(tmp_path, case)
    assert_equal_to_peft(folder, PLAIN, weights=dense_weights(folder))
    adapted = load(folder, PLAIN)
    theirs, _ = mlx_lm.utils.load_model(folder)
    ours = {name.replace(".linear", ""): how for name, how in quantized_modules(adapted).items()}
    assert ours == quantized_modules(theirs) != {}


@every_case
def test_a_dequantized_base_is_plain_and_equals_pytorch(tmp_path: Path, case: Quantized) -> None:
    folder = write_quantized(tmp_path, case)
    assert_equal_to_peft(folder, PLAIN, weights=dense_weights(folder), dequantize=True)
    model = load(folder, dequantize=True)
    assert not quantized_modules(model)
    named = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert all(weight.dtype == mx.float32 for weight in named.values())
    for name, weight in named.items():
        expected = dense_weights(folder)[f"{name}.weight"].astype(np.float32)
        np.testing.assert_allclose(np.array(weight), expected, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", ["llama-4-bits", "llama-mixed", "qwen2-tied"])
def test_dora_on_a_quantized_base_equals_pefts(tmp_path: Path, name: str) -> None:
    folder = write_quantized(tmp_path, CASES[name])
    assert_equal_to_peft(folder, DORA, weights=dense_weights(folder))


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_mlx_lms_logits_agree(tmp_path: Path, name: str) -> None:
    folder = write_quantized(tmp_path, CASES[name])
    theirs, _ = mlx_lm.utils.load_model(folder)
    tokens_BT, weights = batch_of(folder).inputs_BT, dense_weights(folder)
    twins = [FolderTwin(folder, PLAIN, dtype=d, weights=weights) for d in (torch.float32, torch.float64)]
    ref32, ref64 = (twin.logits_without_adapter(tokens_BT) for twin in twins)
    for whose, model in {"mlx-lm": theirs, "mlx_impl": load(folder)}.items():
        logits = np.array(model(mx.array(tokens_BT)))
        verdict = compare(whose, logits, ref32, ref64, longest_sum(folder, batch_of(folder)))
        assert verdict.used <= 1, verdict.report


def test_mlx_lm_ignores_mistrals_sliding_window(tmp_path: Path) -> None:
    """So it is no oracle for this family: its logits are those of `sliding_window: null`."""
    folder = write_quantized(tmp_path, CASES["mistral-window"])
    tokens = mx.array(batch_of(folder).inputs_BT)
    theirs = np.array(mlx_lm.utils.load_model(folder)[0](tokens))
    assert np.abs(theirs - np.array(load(folder)(tokens))).max() > 0.1
    without = np.array(load(with_config(folder, lambda c: c.update(sliding_window=None)))(tokens))
    np.testing.assert_allclose(theirs, without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-4-bits", "llama-mixed-tied-says-false", "mistral-window"])
def test_twenty_greedy_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    folder = write_quantized(tmp_path, CASES[name])
    twin = FolderTwin(folder, PLAIN, dtype=torch.float32, weights=dense_weights(folder))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, VOCAB_SIZE, length).tolist() for length in (17, 3)]
    theirs = [twin.greedy(prompt, 20) for prompt in prompts]
    assert greedy_answers(load(folder, PLAIN, twin.given), prompts, 20) == (theirs, theirs)


def with_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_older_settings_without_mode_and_without_the_duplicate_are_read(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CASES["llama-4-bits"])

    def older(config: dict[str, Any]) -> None:
        del config["quantization_config"], config["quantization"]["mode"]

    before = np.array(load(folder)(mx.array([[3, 5, 8]])))
    np.testing.assert_array_equal(np.array(load(with_config(folder, older))(mx.array([[3, 5, 8]]))), before)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_a_mode_other_than_affine_is_refused_by_name(tmp_path: Path, mode: str) -> None:
    folder = write_quantized(tmp_path, CASES["llama-4-bits"], mode)
    with pytest.raises(ValueError, match=mode) as caught:
        load_model(folder)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization"].update(bits=8), "shape"),
        (lambda c: c["quantization"].update(group_size=32), "shape"),
        (lambda c: c["quantization"].update(bits=7), "7"),
        (lambda c: c["quantization"].update(bits="4"), "bits"),
        (lambda c: c["quantization"].update(bits=4.0), "bits"),
        (lambda c: c["quantization"].update(group_size=48), "48"),
        (lambda c: c["quantization"].update(group_size=0), "group_size"),
        (lambda c: c["quantization"].pop("bits"), "bits"),
        (lambda c: c["quantization"].pop("group_size"), "group_size"),
        (lambda c: (c.pop("quantization"), c.pop("quantization_config")), "quantiz|scales"),
        (lambda c: c.update(quantization=4), "quantization"),
        (lambda c: c["quantization"].update({"model.layers.0.mlp.up_proj": False}), "up_proj"),
        (lambda c: c["quantization"].update({"model.layers.0.mlp.up_proj": {"bits": 9}}), "up_proj"),
        (lambda c: c["quantization"].update({"model.layers.0.mlp.up_proj": 4}), "up_proj"),
    ],
)
def test_a_quantization_that_does_not_fit_the_tensors_is_a_one_line_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = with_config(write_quantized(tmp_path, CASES["llama-4-bits"]), change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert str(caught.value).startswith(str(folder))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("part", ["scales", "biases", "weight"])
def test_a_missing_part_of_a_quantized_weight_is_named(tmp_path: Path, part: str) -> None:
    folder = write_quantized(tmp_path, CASES["llama-4-bits"])
    shutil.rmtree(tmp_path / "source")
    (folder / "model.safetensors.index.json").unlink()
    name = f"model.layers.1.mlp.gate_proj.{part}"
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    del tensors[name]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj"):
        load_model(folder)
