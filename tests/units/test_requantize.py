"""Requantizing: MLX's layout; no error above the update itself; without an update, no bit changes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl.files.requantize import pack_bits, requantize

BITS = (2, 3, 4, 5, 6, 8)


def quantized(bits: int) -> tuple[nn.QuantizedLinear, mx.array]:
    mx.random.seed(0)
    linear = nn.Linear(96, 40, bias=False).to_quantized(32, bits)
    return linear, dequantized(linear.weight, linear.scales, linear.biases, bits)


def dequantized(words: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    return mx.dequantize(words, scales, biases, 32, bits)


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_packed_as_mlx_packs_them(bits: int) -> None:
    linear, _ = quantized(bits)
    ones, zeros = mx.ones((40, 3)), mx.zeros((40, 3))
    numbers = mx.dequantize(linear.weight, ones, zeros, 32, bits)
    assert mx.array_equal(pack_bits(numbers, bits), linear.weight)


@pytest.mark.parametrize("bits", BITS)
def test_without_an_update_no_bit_changes(bits: int) -> None:
    """A new grid would move the weights."""
    linear, weight = quantized(bits)
    before = linear.weight, linear.scales, linear.biases
    after = requantize(weight, linear, mx.float32)
    assert all(mx.array_equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("bits", BITS)
def test_no_group_has_a_larger_error_than_the_base_or_a_new_grid(bits: int, size: float) -> None:
    linear, weight = quantized(bits)
    wanted = weight + size * mx.random.normal(weight.shape)
    written = dequantized(*requantize(wanted, linear, mx.float32), bits)
    words, scales, biases = mx.quantize(wanted, 32, bits)
    anew = dequantized(words, scales, biases, bits)
    errors = [group_errors(candidate, wanted) for candidate in (written, weight, anew)]
    assert (errors[0] <= np.minimum(errors[1], errors[2]) * (1 + 1e-6)).all()


def group_errors(candidate: mx.array, wanted: mx.array) -> np.ndarray:
    return (np.array(candidate - wanted, np.float64) ** 2).reshape(40, 3, 32).sum(axis=-1)


def test_a_group_with_scale_zero_is_requantized() -> None:
    """As a group of equal weights can have."""
    linear = nn.Linear(32, 2, bias=False)
    linear.weight = mx.zeros((2, 32))
    base = linear.to_quantized(32, 4)
    base.scales = mx.zeros((2, 1))
    assert mx.array_equal(dequantized(*requantize(mx.zeros((2, 32)), base, mx.float32), 4), mx.zeros((2, 32)))
