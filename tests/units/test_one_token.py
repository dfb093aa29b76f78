"""A token of each row as rows of a matrix: the logits of the plain code, and no step that repeats itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl.config import LoRAConfig, ModelConfig
from mlx_impl.fast import ops
from mlx_impl.fast.kv_cache import KVCache
from mlx_impl.fast.one_token import OneToken
from mlx_impl.fast.packed_modules import unpacking_first
from mlx_impl.fast.reading import Gap, read_prompt
from mlx_impl.lora import add_lora, lora_layers
from mlx_impl.model import CausalLM, RMSNorm, in_evaluation
from tests.derived import compare
from tests.lora_ladder.cases import SPEC

WIDE = replace(
    SPEC, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
CONFIGS = {
    "untied": replace(WIDE, tie_word_embeddings=False),
    "tied": replace(WIDE, tie_word_embeddings=True),
    "biases and norms": replace(WIDE, qkv_bias=True, qk_norm=True),
    "window": replace(WIDE, sliding_window=4),
}
PROMPTS = [[5, 7, 11, 13, 17, 19, 3], [2, 3, 23, 29, 31, 37, 1], [41, 43, 47, 5, 5, 8, 9]]


def changed(model: CausalLM, adapter: LoRAConfig | None = None, bits: int = 0) -> CausalLM:
    mx.random.seed(2)
    if bits:
        nn.quantize(model, 32, bits)
    if adapter is not None:
        add_lora(model, adapter)
        for layer in lora_layers(model).values():
            layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape)
    return model


CHANGES: dict[str, Callable[[CausalLM], CausalLM]] = {
    "no adapter": changed,
    "LoRA": lambda model: changed(model, LoRAConfig(rank=2, alpha=6.0, dropout=0.5)),
    "DoRA": lambda model: changed(model, LoRAConfig(rank=2, alpha=6.0, use_dora=True)),
    "4 bits": lambda model: changed(model, bits=4),
    "LoRA on 4 bits": lambda model: changed(model, LoRAConfig(rank=2, alpha=6.0), bits=4),
}


def model_of(config: ModelConfig) -> CausalLM:
    mx.random.seed(1)
    model = CausalLM(config)
    model.model.embed_tokens.weight = mx.random.normal((config.vocab_size, config.hidden_size))
    for _, module in model.named_modules():
        if isinstance(module, RMSNorm):  # of ones, one norm would pass for another
            module.weight = 1 + 0.5 * mx.random.normal(module.weight.shape)
    return model


def logits_after_two_tokens(model: CausalLM, prompts: list[list[int]], gap: Gap | None = None) -> mx.array:
    """All but two tokens are read as a prompt."""
    tokens_BT = mx.array(prompts)
    caches = [KVCache() for _ in model.model.layers]
    with in_evaluation(model), unpacking_first(model):
        read_prompt(model, tokens_BT[:, :-2], caches, gap)
        one = OneToken(model, len(prompts))
        one.logits_BV(tokens_BT[:, -2], caches, gap)
        return one.logits_BV(tokens_BT[:, -1], caches, gap)


def require_close(ours: mx.array, plain: mx.array) -> None:
    plain64 = np.array(plain, np.float64)
    verdict = compare("logits", np.array(ours), np.array(plain), plain64, WIDE.intermediate_size)
    assert verdict.used <= 1, verdict.report


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_logits_are_those_of_the_plain_model(
    config: ModelConfig,
    change: Callable[[CausalLM], CausalLM],
    rows: int,
    on_gpu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = change(model_of(config))
    with in_evaluation(model):
        expected_BV = model(mx.array(PROMPTS[:rows]))[:, -1]
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    logits_BV = logits_after_two_tokens(model, PROMPTS[:rows])
    require_close(logits_BV, expected_BV)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_row_with_a_gap_has_the_logits_that_it_has_alone(config: ModelConfig) -> None:
    model = CHANGES["LoRA"](model_of(config))
    shorter = PROMPTS[1][2:]
    logits_BV = logits_after_two_tokens(model, [PROMPTS[0], [9, 9, *shorter]], Gap(0, mx.array([0, 2])))
    with in_evaluation(model):
        expected_V = model(mx.array([shorter]))[0, -1]
    require_close(logits_BV[1], expected_V)


@pytest.mark.parametrize("gap", [None, Gap(0, mx.array([0, 1, 2]))], ids=["no gap", "gaps"])
def test_rope_gets_one_position_without_an_axis_or_one_for_each_row(
    gap: Gap | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an array with an axis MLX's GPU kernels read the b-th number for row b, even if it has but one."""
    shapes: set[tuple[int, ...]] = set()
    rope = mx.fast.rope

    def noted(x: mx.array, *sizes: int, offset: int | mx.array, **given: Any) -> mx.array:
        shapes.add(mx.array(offset).shape)
        return rope(x, *sizes, offset=offset, **given)

    monkeypatch.setattr(mx.fast, "rope", noted)
    logits_after_two_tokens(model_of(CONFIGS["untied"]), PROMPTS, gap)
    assert shapes == ({()} if gap is None else {(len(PROMPTS),)})


def kinds_of_steps(tmp_path: Path, array: mx.array) -> Counter[str]:
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), array)
    return Counter(re.findall(r'label ?="([A-Za-z]+)"', file.read_text()))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("change", "linears"), [("no adapter", 1), ("LoRA", 3)])
def test_a_token_repeats_no_cast_and_no_transpose(
    change: str, linears: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second token on, in bfloat16; MLX's kernels count as one step each, as on a GPU."""
    model = model_of(CONFIGS["untied"])
    model.set_dtype(mx.bfloat16)
    CHANGES[change](model).eval()
    as_one = {
        "rms_norm": lambda x, weight, eps: mx.maximum(x, weight),
        "rope": lambda x, *_, **given: mx.depends([x], [given["offset"]])[0],
        "scaled_dot_product_attention": lambda q, k, v, **_: mx.depends([q], [k, v])[0],
    }
    caches = [KVCache() for _ in model.model.layers]
    mx.eval(read_prompt(model, mx.array(PROMPTS[:rows]), caches))
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    one, token_B = OneToken(model, rows), mx.array([5] * rows)
    mx.eval(one.logits_BV(token_B, caches), [(c.keys_BGCK, c.values_BGCK) for c in caches], one.positions_N)
    for name, function in as_one.items():
        monkeypatch.setattr(mx.fast, name, function)
    kinds: Any = kinds_of_steps(tmp_path, one.logits_BV(token_B, caches))
    layers = len(model.model.layers)
    assert not kinds.keys() & {"AsType", "Transpose", "Contiguous", "Flatten", "Unflatten", "Concatenate"}
    updates = 7 * layers * linears + 1
    assert kinds["Matmul"] + kinds["AddMM"] == updates
    assert kinds["Reshape"] == 4 * layers
    additions = (2 + (7 if linears > 1 and rows == 1 else 0)) * layers
    assert kinds["Add"] <= additions
    assert sum(kinds.values()) <= updates + additions + 20 * layers + 5
