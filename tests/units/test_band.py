"""Attention of a window as a band of chunks: equal to attention with the mask, in memory linear in T."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.config import LoRAConfig
from mlx_impl.data import Example, make_batch, make_packed_batch
from mlx_impl.fast import band, ops
from mlx_impl.fast.band import Band, band_of, pays
from mlx_impl.fast.forward import FAST
from mlx_impl.lora import add_lora
from mlx_impl.model import CausalLM, attention_mask
from mlx_impl.train import PLAIN
from tests.derived import compare, require
from tests.lora_ladder.cases import SPEC, named_case
from tests.units.peak import most_of_a_gradient
from tests.units.test_fast_equals_plain import one_step, require_exact

pytestmark = pytest.mark.usefixtures("on_the_cpu")

H, G, K = 4, 2, 6


def exact_attention(
    q_BHTK: np.ndarray, k_BGTK: np.ndarray, v_BGTK: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """In NumPy, in the type of q."""
    k_BHTK, v_BHTK = (np.repeat(x, H // G, axis=1) for x in (k_BGTK, v_BGTK))
    scores = np.where(mask, q_BHTK @ k_BHTK.swapaxes(-1, -2) / np.sqrt(q_BHTK.dtype.type(K)), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v_BHTK


@pytest.mark.parametrize("min_chunk", [1, 3, 64])
@pytest.mark.parametrize("window", [1, 3, 8, 11, 32, 33, 50])
def test_it_equals_attention_with_the_mask(
    window: int, min_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 33 positions: a last chunk that is filled up, one chunk, a window larger than the row."""
    monkeypatch.setattr(band, "MIN_CHUNK", min_chunk)
    random = np.random.default_rng(window)
    q, k, v = (random.standard_normal((3, heads, 33, K)) for heads in (H, G, G))
    mask = np.array(mx.broadcast_to(full_mask(33, window), (3, 1, 33, 33)))
    found = band_of(33, window).attend(*(mx.array(x, mx.float32) for x in (q, k, v)))
    single = exact_attention(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32), mask)
    require("mix", [compare("mix", np.array(found), single, exact_attention(q, k, v, mask), 33)])


@pytest.mark.parametrize("min_chunk", [1, 3, 64])
@pytest.mark.parametrize("most", [1, 2 * H * 8 * 16, 3 * H * 8 * 16, 10**9])
def test_on_a_gpu_the_gradients_of_some_chunks_at_a_time_are_those_of_all(
    most: int, min_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 2, 3 or 8 tokens of each of three rows: some at a time, the last ones alone, or all."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(band, "MIN_CHUNK", min_chunk)
    monkeypatch.setattr(band, "MAX_SCORES", most)
    random, mask = np.random.default_rng(most), full_mask(33, 8)
    arrays = [mx.array(random.standard_normal((3, heads, 33, K)), mx.float32) for heads in (H, G, G, H)]
    *qkv, d_BHTK = arrays
    mixes, gradients = mx.vjp(band_of(33, 8).attend, qkv, [d_BHTK])
    in_one = mx.vjp(lambda q, k, v: ops.attention(q, k, v, mask), qkv, [d_BHTK])
    for name, ours, single in zip("yqkv", [*mixes, *gradients], [*in_one[0], *in_one[1]], strict=True):
        require(name, [compare(name, np.array(ours), np.array(single), np.array(single, np.float64), 33)])


def backward_bytes(tokens: int, window: int) -> int:
    """The most that attention's backward pass holds beside its inputs."""
    arrays = [mx.random.normal((1, heads, tokens, K)) for heads in (H, G, G, H)]
    banded = band_of(tokens, window)
    mx.eval(arrays, banded.mask_N1CS)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.vjp(banded.attend, arrays[:3], arrays[3:])[1])
    return mx.get_peak_memory() - before


def test_on_a_gpu_the_scores_of_one_chunk_at_a_time_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    at_once = backward_bytes(2048, 256)
    monkeypatch.setattr(band, "MAX_SCORES", 1)
    in_turn = backward_bytes(2048, 256)
    print(f"at once {at_once}, in turn {in_turn} bytes")
    assert in_turn < 0.6 * at_once


def full_mask(T: int, window: int) -> mx.array:
    mask = attention_mask(T, 0, window, None)
    return mx.tri(T).astype(mx.bool_)[None, None] if mask is None else mask


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("batch_name", ["unequal lengths", "a shared prefix", "packed rows"])
def test_loss_and_gradients_equal_the_patterns(
    batch_name: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 to 1e-12, with a window of 4."""
    monkeypatch.setattr(band, "MIN_TOKENS", 1)
    monkeypatch.setattr(band, "MIN_WINDOWS", 1)
    used: list[int] = []
    attend = Band.attend

    def noted(self: Band, *arrays: mx.array) -> mx.array:
        used.append(self.window)
        return attend(self, *arrays)

    monkeypatch.setattr(Band, "attend", noted)
    case = named_case("sliding window")
    require_exact(case, partial(one_step, batch_name=batch_name, checkpointed=checkpointed))
    assert set(used) == {4}


def loss_of(net: CausalLM, seed: int, lengths: tuple[int, ...]) -> tuple[float, float]:
    """Of a batch of packed rows: by the fast path, and by the pattern."""
    random = np.random.default_rng(seed)
    packed = [
        Example(tuple(random.integers(1, SPEC.vocab_size, n).tolist()), (False,) + (True,) * (n - 1))
        for n in lengths
    ]
    batch = make_packed_batch(packed, [tuple(range(len(packed))), (0,)])
    of_fast, of_pattern = (one.batch_loss(net, one.to_arrays(batch))[0].item() for one in (FAST, PLAIN))
    return of_fast, of_pattern


def test_rows_that_are_long_enough_for_it_have_the_patterns_loss() -> None:
    """At the sizes that ship; batches of one shape and other segments, one after the other."""
    net = CausalLM(replace(SPEC, sliding_window=150))
    for seed, lengths in enumerate([(301, 301), (101, 501), (601, 1 + 1)]):
        ours, pattern = (np.array(nats, np.float32) for nats in loss_of(net, seed, lengths))
        require("nats", [compare("nats", ours, pattern, pattern.astype(np.float64), sum(lengths))])


def test_it_pays_for_long_rows_of_many_windows() -> None:
    """MIN_TOKENS and MIN_WINDOWS say from where on."""
    assert not pays(511, 8) and pays(512, 8) and not pays(1000, 400) and pays(1200, 400)


def peak_of_a_gradient(tokens: int) -> int:
    net = CausalLM(replace(SPEC, sliding_window=32, num_hidden_layers=1))
    add_lora(net, LoRAConfig(rank=2))
    mx.eval(net.parameters())
    batch = make_batch([Example((1,) * (tokens + 1), (False,) * tokens + (True,))])
    return most_of_a_gradient(net, batch)


def test_twice_the_tokens_take_twice_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask it would be four times."""
    banded = [peak_of_a_gradient(tokens) for tokens in (512, 1024)]
    monkeypatch.setattr(band, "MIN_TOKENS", 10**9)
    masked = [peak_of_a_gradient(tokens) for tokens in (512, 1024)]
    print(f"band {banded}, mask {masked} bytes")
    assert banded[1] < 2.3 * banded[0]
    assert masked[1] > 3.5 * masked[0] and masked[1] > 4 * banded[1]
