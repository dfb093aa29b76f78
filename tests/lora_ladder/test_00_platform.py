"""Rung 0, platform: which MLX primitives really compute in float64 on the CPU.

The float64 tests of the rungs above rely on primitives that compute in float64 throughout. MLX accepts and
returns float64 for all of them, but `exp`, `sin`, `cos`, `erf` and whatever is built on them silently compute
in float32 inside. Those are strict expected failures (xfail): when MLX fixes one, its test fails here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.derived import FACTOR

Function = Callable[[Any], Any]

X = np.random.default_rng(41).uniform(0.1, 3.0, (16, 64))
W = np.random.default_rng(43).uniform(-1.0, 1.0, (64, 16))
DOUBLE = 2.0**-53

# name: the MLX expression, the same in NumPy, the length of the longest sum
TRULY_DOUBLE: dict[str, tuple[str, Function, int]] = {
    "matmul": ("x @ w", lambda x: x @ W, 64),
    "sum": ("x.sum()", lambda x: x.sum(), X.size),
    "mean": ("x.mean()", lambda x: x.mean(), X.size),
    "square": ("mx.square(x)", np.square, 1),
    "sqrt": ("mx.sqrt(x)", np.sqrt, 1),
    "rsqrt": ("mx.rsqrt(x)", lambda x: 1 / np.sqrt(x), 2),
    "log": ("mx.log(x)", np.log, 1),
    "log1p": ("mx.log1p(x)", np.log1p, 1),
    "expm1": ("mx.expm1(x)", np.expm1, 1),
    "tanh": ("mx.tanh(x)", np.tanh, 1),
    "power of e": ("mx.power(mx.array(math.e, mx.float64), x)", np.exp, 3),
}
SINGLE_INSIDE: dict[str, tuple[str, Function, int]] = {
    "exp": ("mx.exp(x)", np.exp, 1),
    "sin": ("mx.sin(x)", np.sin, 1),
    "cos": ("mx.cos(x)", np.cos, 1),
    "erf": ("mx.erf(x)", np.vectorize(math.erf), 1),
    "sigmoid": ("mx.sigmoid(x)", lambda x: 1 / (1 + np.exp(-x)), 3),
    "softmax": ("mx.softmax(x, axis=-1)", lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True), 64),
    "logsumexp": ("mx.logsumexp(x, axis=-1)", lambda x: np.log(np.exp(x).sum(-1)), 64),
    "fast.rms_norm": (
        "mx.fast.rms_norm(x, None, 0.0)",
        lambda x: x / np.sqrt(np.square(x).mean(-1, keepdims=True)),
        64,
    ),
    "fast.rope": (
        "mx.fast.rope(x[None], 64, traditional=False, base=1e4, scale=1.0, offset=5)[0]",
        lambda x: turned(x, 5 + np.arange(16)),
        3,
    ),
}


def turned(x_TK: np.ndarray, time_T: np.ndarray) -> np.ndarray:
    """Rope, half-split, base 10000."""
    angle_TP = np.outer(time_T, 1e4 ** -(np.arange(32) / 32))
    left, right = np.split(x_TK, 2, axis=-1)
    cos, sin = np.cos(angle_TP), np.sin(angle_TP)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


@pytest.fixture
def mx() -> Any:
    """Skips the test if MLX is not installed."""
    return pytest.importorskip("mlx.core")


def relative_error(mx: Any, expression: str, expected: np.ndarray) -> float:
    """The error in the Frobenius norm, computed on the CPU in what MLX calls float64."""
    with mx.stream(mx.cpu):
        names = {"mx": mx, "math": math, "x": mx.array(X, mx.float64), "w": mx.array(W, mx.float64)}
        result = eval(expression, names)
        assert result.dtype == mx.float64
        return float(np.linalg.norm(np.array(result) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", TRULY_DOUBLE)
def test_it_is_double_throughout(mx: Any, name: str) -> None:
    """It equals NumPy within the rounding of its longest sum in float64."""
    expression, function, longest_sum = TRULY_DOUBLE[name]
    assert relative_error(mx, expression, function(X)) <= FACTOR * np.sqrt(longest_sum) * DOUBLE


@pytest.mark.xfail(strict=True, reason="float32 inside, in MLX 0.32.4", raises=AssertionError)
@pytest.mark.parametrize("name", SINGLE_INSIDE)
def test_it_is_double_throughout_once_mlx_fixes_it(mx: Any, name: str) -> None:
    """A known failure. Once it passes, `tests/trainers/exact_ops.py` need not replace the primitive."""
    expression, function, longest_sum = SINGLE_INSIDE[name]
    assert relative_error(mx, expression, function(X)) <= FACTOR * np.sqrt(longest_sum) * DOUBLE


def test_float32_products_are_not_rounded_to_tf32(mx: Any) -> None:
    """On a GPU this needs MLX_ENABLE_TF32=0: TF32 keeps 10 bits of each factor, float32 keeps 23."""
    x, w = X.astype(np.float32), W.astype(np.float32)
    expected = x.astype(np.float64) @ w
    error = np.linalg.norm(np.array(mx.array(x) @ mx.array(w)) - expected) / np.linalg.norm(expected)
    setting = os.environ.get("MLX_ENABLE_TF32", "unset")
    assert error <= FACTOR * np.sqrt(64) * 2.0**-24, f"error {error:.3g}; MLX_ENABLE_TF32 is {setting}"


def test_the_same_operation_twice_gives_the_same_bits(mx: Any) -> None:
    """The bit-exact claims of the rungs above rely on this."""
    x, w = mx.array(X.astype(np.float32)), mx.array(W.astype(np.float32))
    once, again = ([x @ w, mx.softmax(x, axis=-1), x.sum(), mx.exp(x)] for _ in range(2))
    assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(once, again, strict=True))
