"""The primitives for a CPU equal plain compositions, in value and in every gradient.

The oracle is a plain composition under automatic differentiation, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.fast import cpu_ops
from tests.derived import UNIT_ROUNDOFF, require, within_bfloat16, within_exact
from tests.lora_ladder.cases import random_array
from tests.lora_ladder.protocol import Arrays
from tests.trainers import exact_ops

pytestmark = pytest.mark.usefixtures("on_the_cpu")

B, H, G, T, S, K, D = (
    2,
    6,
    2,
    5,
    8,
    4,
    16,
)  # three queries a key/value head; three keys before the first query
IS_PAST_TS = np.arange(S) <= np.arange(S - T, S)[:, None]
HOLES_B1TS = np.stack([IS_PAST_TS, IS_PAST_TS & (np.arange(S) > 1)])[:, None]  # a mask of its own a row
Op = Callable[..., mx.array]

QUERIES, KEYS, VALUES = ("q", (B, H, T, K)), ("k", (B, G, S, K)), ("v", (B, G, S, K))
CASES: dict[str, tuple[Op, Op, list[tuple[str, tuple[int, ...]]]]] = {
    "attention": (
        lambda q, k, v: cpu_ops.attention(q, k, v, mx.array(IS_PAST_TS)),
        lambda q, k, v: exact_ops.attention(q, k, v, None),
        [QUERIES, KEYS, VALUES],
    ),
    "attention through a mask": (
        lambda q, k, v: cpu_ops.attention(q, k, v, mx.array(HOLES_B1TS)),
        lambda q, k, v: exact_ops.attention(q, k, v, mx.array(HOLES_B1TS)),
        [QUERIES, KEYS, VALUES],
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def results(op: Op, inputs: list[tuple[str, tuple[int, ...]]], dtype: mx.Dtype, compiled: bool) -> Arrays:
    """The value and the gradients of <value, d>, of numbers that bfloat16 can hold."""

    def array(name: str, shape: tuple[int, ...]) -> mx.array:
        return mx.array(random_array(name, shape, 1.0)).astype(mx.bfloat16).astype(dtype)

    def run(*arrays: mx.array) -> list[mx.array]:
        value_shape = op(*arrays).shape
        (value,), gradients = mx.vjp(op, list(arrays), [array("d", value_shape)])
        return [value, *gradients]

    arrays = [array(name, shape) for name, shape in inputs]
    found = (mx.compile(run) if compiled else run)(*arrays)
    assert {array.dtype for array in found} == {dtype}
    names = ["value", *(f"gradient of {name}" for name, _ in inputs)]
    return {name: np.array(array.astype(mx.float32) if array.itemsize < 4 else array)
            for name, array in zip(names, found, strict=True)}  # fmt: skip


@every_case
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_in_float64_it_is_the_composition(name: str, compiled: bool) -> None:
    fast, plain, inputs = CASES[name]
    ours, ref64 = results(fast, inputs, mx.float64, compiled), results(plain, inputs, mx.float64, False)
    require(name, [within_exact(part, ours[part], ref64[part]) for part in ref64])


@every_case
def test_in_bfloat16_it_rounds_no_more_than_its_sums_must(name: str) -> None:
    fast, plain, inputs = CASES[name]
    ours = results(fast, inputs, mx.bfloat16, False)
    ref64 = results(plain, inputs, mx.float64, False)
    require(name, [within_bfloat16(part, ours[part], ref64[part], S) for part in ref64])


def logits(dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Of one row a logit stands out by more than an exponential can hold, and one row counts for nothing."""
    logits_NV = random_array("logits", (4, 50), 3.0)
    logits_NV[1, 7] = 2000.0
    return mx.array(logits_NV, dtype), mx.array([3, 9, 0, 49]), mx.array([True, True, False, True])


def test_cross_entropy_and_its_gradient_are_those_of_log_softmax_in_float64() -> None:
    logits_NV, targets_N, mask_N = logits(mx.float64)
    nats_N, gradient_NV = (np.array(array) for array in cpu_ops.cross_entropy(logits_NV, targets_N, mask_N))
    z_NV, n = np.array(logits_NV), np.arange(4)
    e_NV = np.exp(z_NV - z_NV.max(axis=1, keepdims=True))
    softmax_NV = e_NV / e_NV.sum(axis=1, keepdims=True)
    expected_N = np.log(e_NV.sum(axis=1)) + z_NV.max(axis=1) - z_NV[n, np.array(targets_N)]
    softmax_NV[n, np.array(targets_N)] -= 1
    counts_N = np.array(mask_N)
    require(
        "cross-entropy",
        [
            within_exact("nats", nats_N, expected_N * counts_N),
            within_exact("gradient", gradient_NV, softmax_NV * counts_N[:, None]),
        ],
    )


def test_a_row_that_does_not_count_may_be_infinite() -> None:
    logits_NV = mx.array([[np.inf, 0.0], [1.0, 2.0]])
    nats_N, gradient_NV = cpu_ops.cross_entropy(logits_NV, mx.array([0, 1]), mx.array([False, True]))
    assert nats_N[0].item() == 0
    assert np.isfinite(np.array(gradient_NV)).all()
    assert not gradient_NV[0].any()


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 5000, 1_049_000])
def test_row_sums_are_sums_whatever_is_left_over(n: int) -> None:
    x = random_array("x", (2, n), 1.0)
    sums = np.array(cpu_ops.row_sums(mx.array(x, mx.float64)))
    require("sums", [within_exact(str(n), sums, x.astype(np.float64).sum(axis=-1, keepdims=True))])


def test_many_small_terms_count_in_float32() -> None:
    """50,000 logits, none likely and together they are: summed one by one 0.8% of them are rounded away."""
    V = 50_000
    logits_NV = mx.zeros((1, V)).at[0, 0].add(12.0)
    nats_N, _ = cpu_ops.cross_entropy(logits_NV, mx.array([0]), mx.array([True]))
    expected = np.log1p((V - 1) * np.exp(-12.0))
    assert abs(nats_N.item() - expected) < (cpu_ops.PIECE + V / cpu_ops.PIECE) * UNIT_ROUNDOFF
