"""Causal attention in chunks of queries: the numbers of attention at once, and memory that grows with T."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.fast import ops, query_chunks
from tests.derived import compare, require, within_exact
from tests.lora_ladder.cases import random_array
from tests.units.peak import peak_bytes

pytestmark = pytest.mark.usefixtures("on_the_cpu")

B, H, G, T, K = 2, 6, 3, 19, 8
CHUNKS = {"one query": 1, "seven queries": 7 * B * H * T, "all but one": (T - 1) * B * H * T}


def arrays(dtype: mx.Dtype, tokens: int = T) -> list[mx.array]:
    shapes = {"q": (B, H, tokens, K), "k": (B, G, tokens, K), "v": (B, G, tokens, K), "d": (B, H, tokens, K)}
    return [mx.array(random_array(name, shape, 1.0)).astype(dtype) for name, shape in shapes.items()]


def causal(q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array) -> mx.array:
    return ops.attention(q_BHTK, k_BGTK, v_BGTK, None)


def attention_and_gradients(dtype: mx.Dtype, compiled: bool = False) -> dict[str, np.ndarray]:
    def run(*qkvd: mx.array) -> list[mx.array]:
        *qkv, d = qkvd
        return [part for of in mx.vjp(causal, qkv, [d]) for part in of]

    found = (mx.compile(run) if compiled else run)(*arrays(dtype))
    return dict(zip(("mix", "dq", "dk", "dv"), map(np.array, found), strict=True))


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    return partial(monkeypatch.setattr, query_chunks, "MAX_SCORES")


@pytest.mark.parametrize("scores", CHUNKS.values(), ids=CHUNKS)
def test_values_and_gradients_are_those_of_attention_at_once(scores: int, in_chunks: Any) -> None:
    at_once64, at_once32 = attention_and_gradients(mx.float64), attention_and_gradients(mx.float32)
    in_chunks(scores)
    ours64, ours32 = attention_and_gradients(mx.float64), attention_and_gradients(mx.float32)
    require("float64", [within_exact(n, ours64[n], at_once64[n]) for n in at_once64])
    require("float32", [compare(n, ours32[n], at_once32[n], at_once64[n], T) for n in at_once64])


def test_compiled_too(in_chunks: Any) -> None:
    at_once = attention_and_gradients(mx.float64)
    in_chunks(CHUNKS["seven queries"])
    ours = attention_and_gradients(mx.float64, compiled=True)
    require("compiled", [within_exact(n, ours[n], at_once[n]) for n in at_once])


def test_few_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_chunks, "attention", None)  # a call would raise
    monkeypatch.setattr(query_chunks, "MAX_SCORES", B * H * T * T)
    attention_and_gradients(mx.float32)


def peak_of_a_gradient(tokens: int) -> int:
    def run(*qkvd: mx.array) -> Any:
        *qkv, d = qkvd
        return mx.vjp(causal, qkv, [d])

    return min(peak_bytes(run, *arrays(mx.float32, tokens)) for _ in range(3))


def test_twice_the_tokens_take_twice_the_memory_and_not_four_times(in_chunks: Any) -> None:
    at_once = peak_of_a_gradient(512) / peak_of_a_gradient(256)
    in_chunks(2**16)
    in_turn = peak_of_a_gradient(512) / peak_of_a_gradient(256)
    print(f"in chunks {in_turn:.2f} times, at once {at_once:.2f} times")
    assert at_once > 3 > 2.5 > in_turn
