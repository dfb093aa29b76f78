"""Rung 1, operations: the primitives in `ops` whose form is our own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_impl import ops
from tests.derived import FACTOR, UNIT_ROUNDOFF


def silu64(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_silu_equals_numpys_in_float64() -> None:
    """Each element to a few roundings, of which that of the exponent weighs most: up to 40 times."""
    x = np.linspace(-40, 40, 4001).astype(np.float32)
    error = np.abs(np.array(ops.silu(mx.array(x))) - silu64(x.astype(np.float64)))
    assert (error <= FACTOR * 40 * UNIT_ROUNDOFF * np.abs(silu64(x.astype(np.float64)))).all()


def test_the_gradient_of_silu_equals_numpys_in_float64() -> None:
    """s (1 + x (1 - s)) with s = sigmoid(x); it has a zero, so the error is held against its maximum, 1.1."""
    x = np.linspace(-40, 40, 4001).astype(np.float32)
    s = 1 / (1 + np.exp(-x.astype(np.float64)))
    _, (gradient,) = mx.vjp(ops.silu, [mx.array(x)], [mx.ones(x.shape)])
    assert np.abs(np.array(gradient) - s * (1 + x * (1 - s))).max() <= FACTOR * 1.1 * UNIT_ROUNDOFF


def test_silu_and_its_gradient_are_finite_everywhere() -> None:
    """Where e^-x overflows float32 too."""
    x = mx.array([-1e30, -1000.0, -100.0, -88.8, -80.0, 0.0, 80.0, 1000.0, 1e30])
    (value,), (gradient,) = mx.vjp(ops.silu, [x], [mx.ones(x.shape)])
    assert mx.isfinite(value).all() and mx.isfinite(gradient).all()
    np.testing.assert_allclose(value[-2:], [1000.0, 1e30])
    assert mx.abs(value[1:5]).max() < 1e-30
