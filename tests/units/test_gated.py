"""The gate's written-out gradient is that of silu(gate) * up, in both of its forms.

A CPU keeps the sigmoid for the gradient, a GPU computes it again; here both run on the CPU. Rung 1 of the
ladder compares the one in use with NumPy.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.fast import cpu_ops, ops
from tests.derived import compare, require, within_bfloat16, within_exact
from tests.lora_ladder.cases import random_array
from tests.lora_ladder.protocol import Arrays
from tests.nightly import mostly_at_night
from tests.trainers.exact_ops import exp

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Gate = Callable[[mx.array, mx.array], mx.array]
FORMS: dict[str, Gate] = {
    "in use": ops.gated,
    "kept": cpu_ops.gated,
    "recomputed": ops._gated_recompute,
}


def composed(gate: mx.array, up: mx.array) -> mx.array:
    return gate / (1 + mx.power(np.e, -gate)) * up


def results(gated: Gate, dtype: mx.Dtype, compiled: bool = False) -> Arrays:
    """The value and the gradients of <value, d>."""
    gate, up, d = (
        mx.array(random_array(name, (3, 500), size)).astype(mx.bfloat16).astype(dtype)
        for name, size in (("gate", 4.0), ("up", 1.0), ("d", 1.0))
    )

    def run(gate: mx.array, up: mx.array, d: mx.array) -> list[mx.array]:
        (value,), gradients = mx.vjp(gated, [gate, up], [d])
        return [value, *gradients]

    found = (mx.compile(run) if compiled else run)(gate, up, d)
    assert {array.dtype for array in found} == {dtype}
    return {
        name: np.array(array.astype(mx.float32) if array.itemsize < 4 else array)
        for name, array in zip(("value", "d gate", "d up"), found, strict=True)
    }


every_form = pytest.mark.parametrize("form", FORMS)
eager_and_compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
eager_and_at_night_compiled = pytest.mark.parametrize(
    "compiled", mostly_at_night([False, True], 1), ids=["eager", "compiled"]
)


@every_form
def test_in_float64_the_gate_equals_its_composition(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's exponential is not double on a CPU, so the form for a GPU gets one that is."""
    monkeypatch.setattr(ops, "sigmoid", lambda x: 1 / (1 + exp(-x)))
    ours, ref64 = results(FORMS[form], mx.float64), results(composed, mx.float64)
    require(form, [within_exact(name, ours[name], ref64[name]) for name in ref64])


@eager_and_compiled
@every_form
def test_in_float32_the_gate_equals_its_composition_within_rounding(form: str, compiled: bool) -> None:
    ours = results(FORMS[form], mx.float32, compiled)
    ref32, ref64 = results(composed, mx.float32), results(composed, mx.float64)
    require(form, [compare(name, ours[name], ref32[name], ref64[name], 1) for name in ref64])


@eager_and_at_night_compiled
@every_form
def test_in_bfloat16_the_gate_equals_its_composition_within_rounding(form: str, compiled: bool) -> None:
    ours, ref64 = results(FORMS[form], mx.bfloat16, compiled), results(composed, mx.float64)
    require(form, [within_bfloat16(name, ours[name], ref64[name], 1) for name in ref64])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@every_form
def test_a_gate_far_from_zero_has_finite_gradients(form: str, dtype: mx.Dtype) -> None:
    """Far above zero the gate passes everything, far below nothing, and no gradient is NaN."""
    gate = mx.array([-1000.0, -100.0, 100.0, 1000.0], dtype)
    up, d = mx.full((4,), 2.0, dtype), mx.ones((4,), dtype)
    (value,), (d_gate, d_up) = mx.vjp(FORMS[form], [gate, up], [d])
    for array, open_values in ((value, 2 * gate), (d_gate, up), (d_up, gate)):
        assert mx.isfinite(array).all()
        assert mx.abs(array[:2]).max() < 1e-30
        assert mx.array_equal(array[2:], open_values[2:])
