"""GGUF files read here and by transformers give the same logits and the same greedy tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlx_impl.files.checkpoint import load_model
from tests.derived import assert_within_rounding
from tests.gguf_files import FAMILIES, LLAMA, GGMLType, gguf_tensors, random_weights, write_family
from tests.peers.cases import longest_sum, random_batch
from tests.peers.twin import hugging_face_model

# transformers has no Llama with biases of Q, K and V only, and 5.23 cannot read Mistral's files.
SUPPORTED = ["llama", "llama-tied", "qwen2", "qwen3"]
QUANTIZED = [getattr(GGMLType, name) for name in ("Q8_0", "Q4_0", "Q5_1", "BF16", "Q4_K", "Q6_K")]


def theirs(path: Path, family: str, dtype: torch.dtype) -> Any:
    """transformers' model of the file; it does not read Qwen3's head dimension, so that is given."""
    model_class, kwargs = transformers.AutoModelForCausalLM, {}
    if family == "qwen3":
        kwargs["config"] = hugging_face_model(FAMILIES[family][1]).config
    model: Any = model_class.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **kwargs)
    return model.eval()


def logits_of(model: Any, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {"logits": model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()}


@pytest.mark.parametrize("family", SUPPORTED)
def test_logits_equal_those_of_transformers_on_the_same_file(tmp_path: Path, family: str) -> None:
    path, batch = write_family(tmp_path / "tiny.gguf", family), random_batch(LLAMA)
    ours = {"logits": np.array(load_model(path).model(mx.array(batch.inputs_BT)))}
    ref32, ref64 = (
        logits_of(theirs(path, family, d), batch.inputs_BT) for d in (torch.float32, torch.float64)
    )
    assert_within_rounding(f"gguf, {family}", ours, ref32, ref64, longest_sum(LLAMA, batch))


@pytest.mark.parametrize("family", SUPPORTED)
def test_twenty_greedy_tokens_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    path, prompt = write_family(tmp_path / "tiny.gguf", family), [[7, 3, 50, 21]]
    model = theirs(path, family, torch.float32)
    tokens = model.generate(
        torch.tensor(prompt), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
    )
    ours, seen = load_model(path).model, list(prompt[0])
    for _ in range(20):
        seen.append(int(mx.argmax(ours(mx.array([seen]))[0, -1]).item()))
    assert seen == tokens[0].tolist()


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_a_quantized_file_equals_transformers_on_the_dequantized_weights(
    tmp_path: Path, kind: GGMLType
) -> None:
    """Every matrix, Q and K included, in blocks of random bytes below 64, so that scales are finite."""
    spec = replace(LLAMA, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32)
    rng, plain = np.random.default_rng(int(kind)), gguf_tensors("llama", spec, random_weights(spec))
    matrices = {name for name, array in plain.items() if array.ndim == 2}
    blocks = {
        name: rng.integers(0, 64, gguf.quant_shape_to_byte_shape(plain[name].shape, kind), dtype=np.uint8)
        for name in matrices
    }
    path = write_family(
        tmp_path / "tiny.gguf", tensors=blocks, types=dict.fromkeys(matrices, kind), spec=spec
    )
    batch = random_batch(spec)
    ours = {"logits": np.array(load_model(path).model(mx.array(batch.inputs_BT)))}
    ref32, ref64 = (
        logits_of(theirs(path, "llama", d), batch.inputs_BT) for d in (torch.float32, torch.float64)
    )
    assert_within_rounding(f"gguf, {kind.name}", ours, ref32, ref64, longest_sum(spec, batch))
