"""Requantizing: MLX's layout; no more noise than the update itself; without an update, every bit."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl.files.requantize import pack, requantize

BITS = (2, 3, 4, 5, 6, 8)


def quantized(bits: int) -> tuple[nn.QuantizedLinear, mx.array]:
    mx.random.seed(0)
    linear = nn.Linear(96, 40, bias=False).to_quantized(32, bits)
    return linear, unpacked(linear.weight, linear.scales, linear.biases, bits)


def unpacked(words: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    return mx.dequantize(words, scales, biases, 32, bits)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_packed_as_mlx_packs_them(bits: int) -> None:
    linear, _ = quantized(bits)
    ones, zeros = mx.ones((40, 3)), mx.zeros((40, 3))
    numbers = mx.dequantize(linear.weight, ones, zeros, 32, bits)
    assert mx.array_equal(pack(numbers, bits), linear.weight)


@pytest.mark.parametrize("bits", BITS)
def test_without_an_update_no_bit_changes(bits: int) -> None:
    """A grid fitted anew would move the weights."""
    linear, weight = quantized(bits)
    before = linear.weight, linear.scales, linear.biases
    after = requantize(weight, linear, mx.float32)
    assert all(mx.array_equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("bits", BITS)
def test_no_group_is_farther_from_the_update_than_the_base_or_a_new_grid_is(bits: int, size: float) -> None:
    linear, weight = quantized(bits)
    wanted = weight + size * mx.random.normal(weight.shape)
    written = unpacked(*requantize(wanted, linear, mx.float32), bits)
    words, scales, biases = mx.quantize(wanted, 32, bits)
    anew = unpacked(words, scales, biases, bits)
    errors = [group_errors(candidate, wanted) for candidate in (written, weight, anew)]
    assert (errors[0] <= np.minimum(errors[1], errors[2]) * (1 + 1e-6)).all()


def group_errors(candidate: mx.array, wanted: mx.array) -> np.ndarray:
    return (np.array(candidate - wanted, np.float64) ** 2).reshape(40, 3, 32).sum(axis=-1)


def test_a_group_of_one_value_has_no_step() -> None:
    """Its scale may be zero."""
    linear = nn.Linear(32, 2, bias=False)
    linear.weight = mx.zeros((2, 32))
    packed = linear.to_quantized(32, 4)
    packed.scales = mx.zeros((2, 1))
    assert mx.array_equal(unpacked(*requantize(mx.zeros((2, 32)), packed, mx.float32), 4), mx.zeros((2, 32)))
