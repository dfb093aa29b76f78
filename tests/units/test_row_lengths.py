"""The lengths of DoRA's rows without the rows: float64 numpy, which forms the rows, is the oracle."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_impl.fast import ops
from mlx_impl.fast.low_rank import low_rank_of
from mlx_impl.fast.projection import JointLinears
from mlx_impl.fast.row_lengths import row_lengths
from mlx_impl.lora import DoRALinear
from tests.derived import EXACT, UNIT_ROUNDOFF
from tests.lora_ladder.cases import random_array

pytestmark = pytest.mark.usefixtures("on_the_cpu")

O, I, R = 40, 96, 4  # noqa: E741
SCALE = -1.5


class Numbers(NamedTuple):
    """In float32; the rows of the weight from 10 on are cancelled to 1 / t of the update's length."""

    weight_OI: np.ndarray
    a_IR: np.ndarray
    b_RO: np.ndarray

    @property
    def update_OI(self) -> np.ndarray:
        return SCALE * (self.a_IR.astype(np.float64) @ self.b_RO.astype(np.float64)).T

    @property
    def lengths_O(self) -> np.ndarray:
        return np.linalg.norm(self.weight_OI + self.update_OI, axis=1)

    @property
    def bound_O(self) -> np.ndarray:
        """Of the relative error: each term of the sums rounded I + 2 R + 4 times, always in one direction."""
        a_R, roundoff = np.linalg.norm(self.a_IR, axis=0), (I + 2 * R + 4) * UNIT_ROUNDOFF
        of_terms_O = np.linalg.norm(self.weight_OI, axis=1) + abs(SCALE) * (a_R @ np.abs(self.b_RO))
        return roundoff * (of_terms_O / self.lengths_O) ** 2

    def computed(self, base: mx.Dtype = mx.float32, factors: mx.Dtype = mx.float32) -> mx.array:
        weight_OI, a_IR, b_RO = map(mx.array, self)
        return row_lengths(weight_OI.astype(base), a_IR.astype(factors), b_RO.astype(factors), SCALE)


def numbers(t: float = 1.0) -> Numbers:
    shapes = {"weight": (O, I), "a": (I, R), "b": (R, O), "rest": (O, I)}
    weight_OI, a_IR, b_RO, rest_OI = (random_array(n, s, 0.5).astype(np.float32) for n, s in shapes.items())
    drawn = Numbers(weight_OI, a_IR, b_RO)
    if t > 1:
        length_O1 = np.linalg.norm(drawn.update_OI, axis=1, keepdims=True) / t
        rest_OI = length_O1 * rest_OI / np.linalg.norm(rest_OI, axis=1, keepdims=True)
        weight_OI[10:] = (rest_OI - drawn.update_OI)[10:]
    return drawn


@pytest.mark.parametrize("t", [1, 10, 100])
def test_lengths_are_as_near_as_the_bound_says(t: float) -> None:
    drawn = numbers(t)
    error_O = np.abs(np.array(drawn.computed()) / drawn.lengths_O - 1)
    np.testing.assert_array_less(error_O, drawn.bound_O)


@pytest.mark.parametrize("t", [10, 100])
def test_cancelled_rows_are_that_much_shorter_and_change_no_other(t: float) -> None:
    """So that the test above has what it is about."""
    drawn, plain = numbers(t), numbers()
    ratio_O = np.linalg.norm(drawn.weight_OI, axis=1) / drawn.lengths_O
    np.testing.assert_allclose(ratio_O[10:], t, rtol=0.2)
    np.testing.assert_allclose(np.array(drawn.computed())[:10], np.array(plain.computed())[:10], rtol=1e-6)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_in_float64_they_are_exact(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    drawn = numbers()
    computed_O = np.array(drawn.computed(mx.float64, mx.float64))
    np.testing.assert_allclose(computed_O, drawn.lengths_O, rtol=EXACT)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_a_bfloat16_weight_is_widened_first(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors, and so the lengths, are float32."""
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    drawn = numbers()
    rounded_OI = np.array(mx.array(drawn.weight_OI).astype(mx.bfloat16).astype(mx.float32))
    drawn, computed_O = drawn._replace(weight_OI=rounded_OI), drawn.computed(base=mx.bfloat16)
    assert computed_O.dtype == mx.float32
    np.testing.assert_array_less(np.abs(np.array(computed_O) / drawn.lengths_O - 1), drawn.bound_O)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_a_linear_in_bfloat16_has_the_lengths_of_factors_in_float32(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its products take the factors in the type of x; rounded first, V's rows would have other lengths."""
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    drawn = numbers()
    rounded_OI = mx.array(drawn.weight_OI).astype(mx.bfloat16)
    linear = nn.Linear(I, O, bias=False)
    linear.weight = rounded_OI
    layer = DoRALinear(linear, R, SCALE, 0.0)
    layer.lora_a, layer.lora_b = mx.array(drawn.a_IR), mx.array(drawn.b_RO)
    part = low_rank_of(layer)
    assert part is not None
    joint, x_NI = JointLinears([part], mx.bfloat16), mx.ones((3, I), mx.bfloat16)
    lengths_O = joint.forward(x_NI, [], joint.factors)[1]
    drawn = drawn._replace(weight_OI=np.array(rounded_OI.astype(mx.float32)))
    np.testing.assert_array_less(np.abs(np.array(lengths_O) / drawn.lengths_O - 1), drawn.bound_O)


def test_a_row_that_is_cancelled_entirely_is_as_long_as_the_rounding_of_the_weight_at_least() -> None:
    """The square of its length would be below 0 for some of them, and the root NaN."""
    drawn = numbers(t=1e9)
    computed_O, base_O = np.array(drawn.computed())[10:], np.linalg.norm(drawn.weight_OI[10:], axis=1)
    assert np.isfinite(computed_O).all()
    assert (computed_O >= 0.999 * UNIT_ROUNDOFF * base_O).all()
    assert (computed_O <= 0.01 * base_O).all()


def test_a_row_of_zeros_has_length_zero_and_nan_stays() -> None:
    drawn = numbers()
    drawn.weight_OI[3], drawn.b_RO[:, 3] = 0, 0
    drawn.b_RO[1, 5], drawn.weight_OI[6, 0] = np.nan, np.nan
    computed_O = np.array(drawn.computed())
    assert computed_O[3] == 0
    assert np.flatnonzero(np.isnan(computed_O)).tolist() == [5, 6]
