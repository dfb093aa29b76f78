"""What a need counts of attention's scores and mask, on a CPU, on CUDA and on Metal; and of norms."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_impl.data import Example, make_batch, make_packed_batch
from mlx_impl.fast import memory_work, ops
from mlx_impl.fast.described import described_sizes
from mlx_impl.fast.memory_scores import mask_bytes, scores_at_once_bytes
from mlx_impl.fast.memory_sizes import Shape, shape_of
from tests.units.test_fit import WIDE, setting

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_on_a_cpu_the_norms_of_16_bits_keep_their_inputs_in_float32() -> None:
    """Two a block, each of twice the bytes: `fast::rms_norm`'s fallback in MLX."""
    in_32, in_16 = (described_sizes(WIDE, dtype).a_position for dtype in (mx.float32, mx.bfloat16))
    assert in_16 - in_32 == 2 * WIDE.hidden_size


SCORES = WIDE.num_attention_heads * 256 * 256  # numbers, of a row of 256 tokens


def needs_of_blocks(numbers: tuple[int, ...], dtype: mx.Dtype, window: int | None, tokens: int) -> list[int]:
    configs = [replace(WIDE, num_hidden_layers=n, sliding_window=window) for n in numbers]
    return [setting(config=config, dtype=dtype).bytes_needed(1, tokens) for config in configs]


@pytest.mark.parametrize("window", [None, 64])
def test_cuda_keeps_attention_weights_in_32_bits_and_none_in_16(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's attention has 16 bits only, and the backward pass makes them again (fast.cpp in MLX 0.32)."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    few, many = needs_of_blocks((1, 9), mx.float32, window, 256)
    few16, many16 = needs_of_blocks((1, 9), mx.bfloat16, window, 256)
    none16 = needs_of_blocks((1, 9), mx.bfloat16, None, 256)
    assert many - few - (many16 - few16) >= 8 * SCORES * 4
    assert many16 - few16 == pytest.approx(none16[1] - none16[0], abs=2)


def test_on_cuda_the_heads_share_the_mask_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all blocks, as booleans and numbers; on the plain path MLX makes three arrays of all heads."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    windowed, full = (setting(config=replace(WIDE, sliding_window=w), dtype=mx.bfloat16) for w in (64, None))
    assert windowed.bytes_needed(1, 64) == full.bytes_needed(1, 64)
    of_mask = 256 * 256 * (1 + 2)
    assert of_mask <= windowed.bytes_needed(1, 256) - full.bytes_needed(1, 256) < 2 * of_mask
    plain = replace(described_sizes(replace(WIDE, sliding_window=64), mx.bfloat16), plain=True)
    assert mask_bytes(plain, Shape(1, 256, 256, 256)) == 3 * SCORES * 2


def test_on_cuda_rows_not_of_whole_tiles_have_attention_weights_of_one_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuDNN's backward pass has tiles of 128 (`ScaledDotProductAttentionVJP::use_fallback`)."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    sizes = described_sizes(WIDE, mx.bfloat16)
    whole, broken = (memory_work.work_bytes(sizes, Shape(1, n, 256, 256)) for n in (256, 320))
    assert broken - whole >= 5 * WIDE.num_attention_heads * 320 * 320 * 2


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_band_on_a_gpu_keeps_no_attention_weights(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`band.in_turn` keeps q, k and v: also on Metal and in float32, whose other attention keeps weights."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    cuda = needs_of_blocks((1, 9), mx.bfloat16, 64, 512)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    few, many = needs_of_blocks((1, 9), dtype, 64, 512)
    weights = 8 * WIDE.num_attention_heads * 512 * 128 * dtype.size
    assert many - few < (cuda[1] - cuda[0]) * dtype.size // 2 + weights // 2


def test_twice_as_long_a_row_of_many_windows_needs_twice_as_much() -> None:
    """Its attention is a band of blocks (`fast/band.py`)."""
    one = setting(config=replace(WIDE, sliding_window=64))
    four, eight = one.bytes_needed(1, 4096), one.bytes_needed(1, 8192)
    assert eight < 2.05 * four


def test_the_plain_path_has_a_mask_of_each_packed_row() -> None:
    """Rows that are not packed share one: booleans, the bias made of them, and its gradient."""
    sizes = replace(described_sizes(WIDE, mx.float32), plain=True)
    examples = [Example((1,) * 33, (True,) * 33) for _ in range(6)]
    packed, padded = make_packed_batch(examples, [(0, 1), (2, 3), (4, 5)]), make_batch(examples)
    assert packed.inputs_BT.shape == (3, 64) and padded.inputs_BT.shape == (6, 32)
    assert mask_bytes(sizes, shape_of(packed)) == 3 * 64 * 64 * (1 + 1 + 4)
    assert mask_bytes(sizes, shape_of(padded)) == 32 * 32 * (1 + 1 + 4)


@pytest.mark.parametrize(("window", "tokens", "keys"), [(64, 512, 128), (512, 1600, 0)])
def test_on_cuda_the_queries_of_a_band_are_those_of_a_chunk(
    window: int, tokens: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 64 are no whole tiles of 128, though the row is; chunks of 128 are, though it is not."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    sizes = described_sizes(replace(WIDE, sliding_window=window), mx.bfloat16)
    at_once = scores_at_once_bytes(sizes, Shape(1, tokens, tokens, tokens))
    assert at_once == WIDE.num_attention_heads * tokens * keys * 2


def test_attention_on_metal_keeps_its_weights_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's Metal backend trains with unfused attention (`ScaledDotProductAttention::use_fallback`)."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    cuda = setting(dtype=mx.bfloat16).bytes_needed(1, 512)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    scores = WIDE.num_hidden_layers * WIDE.num_attention_heads * 512 * 512 * 2
    assert setting(dtype=mx.bfloat16).bytes_needed(1, 512) - cuda > scores
