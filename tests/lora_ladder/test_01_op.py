"""Rung 1, op: each production primitive and its pullback equal NumPy's float64 within derived rounding.

The primitives need a rung of their own, because the float64 tests of the rungs above replace them with exact
compositions: those tests prove the algebra, this rung proves what production computes. MLX: `mx.fast` kernels
have hand-written pullbacks, which a correct formula in the model says nothing about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.derived import FACTOR, UNIT_ROUNDOFF, compare
from tests.lora_ladder import numpy_ops
from tests.lora_ladder.judge import Judge

pytestmark = [pytest.mark.needs("ops"), pytest.mark.alone]

FREQUENCIES = tuple(1000.0 ** -(k / 5) for k in range(5))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Op:
    """A primitive of the candidate, its value and pullback in NumPy, inputs, the longest sum's length."""

    call: Callable[..., Any]  # (ops, *inputs)
    value: Callable[..., np.ndarray]
    pullback: Callable[..., Any]  # (*inputs, g) -> the gradient of each input
    inputs: tuple[np.ndarray, ...]
    longest_sum: int


def attention_op(num_queries: int) -> Op:
    inputs = normal(2, 6, num_queries, 10), normal(2, 2, 13, 10), normal(2, 2, 13, 10)
    return Op(
        lambda ops, q, k, v: ops.attention(q, k, v, None),
        numpy_ops.attention,
        numpy_ops.attention_pullback,
        inputs,
        3 * 13,  # a key/value head sums over three query heads and their positions
    )


# The position ids of packed examples.
POSITIONS_BT = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 0]])
NUMBER_BT = np.cumsum(POSITIONS_BT == 0, axis=1)
OWN_EXAMPLE_B1TS = ((NUMBER_BT[:, :, None] == NUMBER_BT[:, None, :]) & np.tri(9, dtype=bool))[:, None]


def rms_norm_op(size: float) -> Op:
    return Op(
        lambda ops, x, w: ops.rms_norm(x, w, 1e-5),
        lambda x, w: numpy_ops.rms_norm(x, w, 1e-5),
        lambda x, w, g: numpy_ops.rms_norm_pullback(x, w, 1e-5, g),
        (np.float32(size) * normal(2, 7, 48), normal(48)),
        48,
    )


OPS = {
    "rms_norm of small numbers": rms_norm_op(0.01),  # the squares are no larger than eps
    "rms_norm": rms_norm_op(1.0),
    "rope": Op(
        lambda ops, x: ops.rope(x, FREQUENCIES, 3),
        lambda x: numpy_ops.rope(x, FREQUENCIES, 3),
        lambda x, g: (numpy_ops.rope(g, FREQUENCIES, 3, sign=-1),),
        (normal(2, 3, 29, 10),),
        2,
    ),
    "rope at position ids": Op(
        lambda ops, x: ops.rope(x, FREQUENCIES, type(x)(POSITIONS_BT)),
        lambda x: numpy_ops.rope_at(x, FREQUENCIES, POSITIONS_BT),
        lambda x, g: (numpy_ops.rope_at(g, FREQUENCIES, POSITIONS_BT, sign=-1),),
        (normal(2, 3, 9, 10),),
        2,
    ),
    "attention with a mask": Op(
        lambda ops, q, k, v: ops.attention(q, k, v, type(q)(OWN_EXAMPLE_B1TS)),
        lambda q, k, v: numpy_ops.attention(q, k, v, OWN_EXAMPLE_B1TS),
        lambda q, k, v, g: numpy_ops.attention_pullback(q, k, v, g, OWN_EXAMPLE_B1TS),
        (normal(2, 6, 9, 10), normal(2, 2, 9, 10), normal(2, 2, 9, 10)),
        3 * 9,
    ),
    "attention": attention_op(13),
    "attention to a cache": attention_op(5),
    "silu": Op(
        lambda ops, x: ops.silu(x),
        numpy_ops.silu,
        lambda x, g: (numpy_ops.silu_pullback(x, g),),
        (4 * normal(3, 500),),
        1,
    ),
    "gated": Op(
        lambda ops, gate, up: ops.gated(gate, up),
        numpy_ops.gated,
        numpy_ops.gated_pullback,
        (4 * normal(3, 500), normal(3, 500)),
        1,
    ),
    "logsumexp": Op(
        lambda ops, x: ops.logsumexp(x),
        numpy_ops.logsumexp,
        lambda x, g: (numpy_ops.logsumexp_pullback(x, g),),
        (5 * normal(7, 200),),
        200,
    ),
    "logsumexp over a real vocabulary": Op(
        lambda ops, x: ops.logsumexp(x),
        numpy_ops.logsumexp,
        lambda x, g: (numpy_ops.logsumexp_pullback(x, g),),
        (3 * normal(3, 49_152),),
        49_152,
    ),
    # Far below 0, so that a 0 in the padding of a last block would outweigh them all.
    "logsumexp over a vocabulary that fills no blocks": Op(
        lambda ops, x: ops.logsumexp(x),
        numpy_ops.logsumexp,
        lambda x, g: (numpy_ops.logsumexp_pullback(x, g),),
        (3 * normal(3, 1_111) - 20,),
        1_111,
    ),
}


@pytest.fixture
def mx() -> Any:
    return pytest.importorskip("mlx.core")


class Claimed:
    """A namespace of primitives; a missing one is not claimed."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self._namespace, name):
            raise NotImplementedError(f"ops.{name}")
        return getattr(self._namespace, name)


@pytest.fixture
def ops(candidate: Any) -> Claimed:
    return Claimed(candidate.ops)


def doubled(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return tuple(array.astype(np.float64) for array in arrays)


@pytest.mark.parametrize("name", OPS)
def test_its_value_is_numpys(mx: Any, ops: Any, judge: Judge, name: str) -> None:
    """Compared with NumPy in float64; the tolerance comes from the error of NumPy in float32."""
    op = OPS[name]
    ours = np.array(op.call(ops, *map(mx.array, op.inputs)))
    value32, value64 = op.value(*op.inputs), op.value(*doubled(op.inputs))
    judge.hold([compare(name, ours, value32, value64, op.longest_sum)])


@pytest.mark.parametrize("name", OPS)
def test_its_pullback_is_numpys(mx: Any, ops: Any, judge: Judge, name: str) -> None:
    """The gradient of <value, g> with respect to every input, for a random g."""
    op = OPS[name]
    g = normal(*op.value(*op.inputs).shape)
    _, ours = mx.vjp(lambda *inputs: op.call(ops, *inputs), list(map(mx.array, op.inputs)), [mx.array(g)])
    single, double = op.pullback(*op.inputs, g), op.pullback(*doubled((*op.inputs, g)))
    verdicts = [
        compare(f"{name}, input {number}", np.array(one), one32, one64, op.longest_sum)
        for number, (one, one32, one64) in enumerate(zip(ours, single, double, strict=True))
    ]
    judge.hold(verdicts)


@pytest.mark.parametrize(("vocab_size", "mean"), [(200, 0), (1_111, -20), (49_152, 0)])
def test_cross_entropy_and_its_gradient_are_numpys(
    mx: Any, ops: Any, judge: Judge, vocab_size: int, mean: float
) -> None:
    """One call returns the nats of each target and the gradient of their sum; both are 0 in a masked row."""
    logits_NV = 3 * normal(5, vocab_size) + np.float32(mean)
    targets_N, mask_N = np.array([0, 7, vocab_size - 1, 3, 3]), np.array([True, True, True, False, True])
    ours = ops.cross_entropy(mx.array(logits_NV), mx.array(targets_N), mx.array(mask_N))
    single = numpy_ops.cross_entropy(logits_NV, targets_N, mask_N)
    double = numpy_ops.cross_entropy(logits_NV.astype(np.float64), targets_N, mask_N)
    names = ("nats", "gradient")
    judge.hold(
        [
            compare(name, np.array(one), one32, one64, vocab_size)
            for name, one, one32, one64 in zip(names, ours, single, double, strict=True)
        ]
    )


def test_logsumexp_is_right_for_large_logits(mx: Any, ops: Any, judge: Judge) -> None:
    """A constant added to a row is added to its result, even where exp of it overflows or underflows."""
    x_NV = normal(3, 200) + np.array([[1000.0], [100.0], [-1000.0]], dtype=np.float32)
    ours = np.array(ops.logsumexp(mx.array(x_NV)))
    value32, value64 = numpy_ops.logsumexp(x_NV), numpy_ops.logsumexp(x_NV.astype(np.float64))
    judge.hold([compare("logsumexp", ours, value32, value64, 200)])


def test_silu_is_right_element_by_element(mx: Any, ops: Any) -> None:
    """Within a few roundings. Rounding the exponent weighs most: up to 40 times, as |x| goes up to 40."""
    x = np.linspace(-40, 40, 4001).astype(np.float32)
    expected = numpy_ops.silu(x.astype(np.float64))
    error = np.abs(np.array(ops.silu(mx.array(x))) - expected)
    assert (error <= FACTOR * 40 * UNIT_ROUNDOFF * np.abs(expected)).all()


def test_the_gate_is_right_element_by_element(mx: Any, ops: Any) -> None:
    """The fused silu(gate) * up is as accurate as silu alone."""
    x = np.linspace(-40, 40, 4001).astype(np.float32)
    expected = numpy_ops.silu(x.astype(np.float64))
    error = np.abs(np.array(ops.gated(mx.array(x), mx.ones(x.shape))) - expected)
    assert (error <= FACTOR * 40 * UNIT_ROUNDOFF * np.abs(expected)).all()


def test_the_gradient_of_silu_is_right_element_by_element(mx: Any, ops: Any) -> None:
    """The gradient has a zero, so the error is compared with its maximum, 1.1."""
    x = np.linspace(-40, 40, 4001).astype(np.float32)
    expected = numpy_ops.silu_pullback(x.astype(np.float64), np.ones(x.shape))
    _, (gradient,) = mx.vjp(ops.silu, [mx.array(x)], [mx.ones(x.shape)])
    assert np.abs(np.array(gradient) - expected).max() <= FACTOR * 1.1 * UNIT_ROUNDOFF


def test_the_gate_and_its_gradients_are_finite_everywhere(mx: Any, ops: Any) -> None:
    """Even where e^-gate overflows float32. Far below zero, value and gradients are 0."""
    gate, up = mx.array([-1e30, -1000.0, -100.0, -88.8, -80.0, 0.0, 80.0, 1000.0, 1e30]), mx.full((9,), 2.0)
    (value,), gradients = mx.vjp(ops.gated, [gate, up], [mx.ones(9)])
    for array in (value, *gradients):
        assert mx.isfinite(array).all()
        assert mx.abs(array[1:5]).max() < 1e-30
    assert np.array_equal(np.array(value[-2:]), np.array([2e3, 2e30], dtype=np.float32))


def test_silu_and_its_gradient_are_finite_everywhere(mx: Any, ops: Any) -> None:
    """Even where e^-x overflows float32."""
    x = mx.array([-1e30, -1000.0, -100.0, -88.8, -80.0, 0.0, 80.0, 1000.0, 1e30])
    (value,), (gradient,) = mx.vjp(ops.silu, [x], [mx.ones(x.shape)])
    assert mx.isfinite(value).all() and mx.isfinite(gradient).all()
    assert np.array_equal(np.array(value[-2:]), np.array([1000.0, 1e30], dtype=np.float32))
    assert mx.abs(value[1:5]).max() < 1e-30
