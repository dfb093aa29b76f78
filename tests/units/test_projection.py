"""Linears of one input together equal the same linears one by one, in value and in every gradient.

The oracle is `LoRALinear.__call__` under automatic differentiation, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_impl.fast import ops
from mlx_impl.fast.low_rank import low_rank_of
from mlx_impl.fast.projection import project, project_gated
from mlx_impl.lora import DoRALinear, LoRALinear
from mlx_impl.targets import AnyLinear
from tests.derived import Verdict, compare, require, require_same_names, within_bfloat16, within_exact
from tests.lora_ladder.cases import random_array
from tests.lora_ladder.protocol import Arrays

pytestmark = pytest.mark.usefixtures("on_the_cpu")

B, T, I = 2, 7, 32  # noqa: E741
LONGEST_SUM = 32  # of the input's width, an output's, the batch's 14 positions, and the ranks


@dataclass(frozen=True)
class Part:
    """One linear of a group; rank 0: without an adapter."""

    num_out: int
    rank: int = 3
    scale: float = 2.0
    bias: bool = False
    kind: type[LoRALinear] = LoRALinear


GROUPS = {
    "one": [Part(9)],
    "alike": [Part(9), Part(9), Part(9)],
    "unequal ranks and scales": [Part(20, 2, 0.3), Part(31, 5, 7.0), Part(10, 1, -1.0)],
    "biases": [Part(9, bias=True), Part(10), Part(11, bias=True)],
    "the middle not adapted": [Part(9), Part(10, 0, bias=True), Part(11)],
    "one of three adapted": [Part(9, 0), Part(10, 0), Part(11, bias=True)],
    "none adapted": [Part(9, 0), Part(10, 0, bias=True)],
    "DoRA": [Part(9, bias=True, kind=DoRALinear), Part(9, 2, -1.0, kind=DoRALinear)],
    "DoRA in the middle": [Part(9), Part(10, 5, 0.3, kind=DoRALinear), Part(11, bias=True)],
}


COMPILED = ("unequal ranks and scales", "biases", "the middle not adapted", "DoRA")  # each costs seconds
eager_and_compiled = pytest.mark.parametrize(
    ("name", "compiled"),
    [*((name, False) for name in GROUPS), *((name, True) for name in COMPILED)],
    ids=[*GROUPS, *(f"{name}, compiled" for name in COMPILED)],
)


class Group(nn.Module):
    """Frozen linears, factors that train, B not zero."""

    def __init__(self, parts: list[Part]) -> None:
        super().__init__()
        self.linears: list[Any] = [make_linear(part, place) for place, part in enumerate(parts)]
        self.freeze()
        for place, part in enumerate(parts):
            if part.rank:
                self.linears[place] = adapted(self.linears[place], part, part.kind, 0.0, place)

    def in_type(self, base: mx.Dtype, factors: mx.Dtype) -> Group:
        trained = {name for name, _ in tree_flatten(self.trainable_parameters())}
        cast = [(n, a.astype(factors if n in trained else base)) for n, a in tree_flatten(self.parameters())]
        return self.load_weights(cast)


def make_linear(part: Part, place: int) -> nn.Linear:
    linear = nn.Linear(I, part.num_out, bias=part.bias)
    linear.weight = mx.array(random_array(f"weight {place}", (part.num_out, I), 0.5))
    if part.bias:
        linear.bias = mx.array(random_array(f"bias {place}", (part.num_out,), 0.5))
    return linear


def adapted(linear: AnyLinear, part: Part, kind: type[LoRALinear], dropout: float, place: int) -> LoRALinear:
    layer = kind(linear, part.rank, part.scale, dropout)
    layer.lora_a = mx.array(random_array(f"a {place}", (I, part.rank), 0.5))
    layer.lora_b = mx.array(random_array(f"b {place}", (part.rank, part.num_out), 0.5))
    return layer


Compute = Callable[..., list[mx.array]]


def one_by_one(x_BTI: mx.array, *linears: nn.Module) -> list[mx.array]:
    return [linear(x_BTI) for linear in linears]


def given(name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Random numbers that bfloat16 holds, in this type."""
    return mx.array(random_array(name, shape, 1.0)).astype(mx.bfloat16).astype(dtype)


def results(
    group: Group, compute: Compute, dtype: mx.Dtype, compiled: bool = False, width: int = I
) -> dict[str, mx.array]:
    """Every y, and the gradients of <y, c> for random c: of x, and of every factor by name."""
    own, x_BTI = group.trainable_parameters(), given("x", (B, T, width), dtype)

    def weighed(factors: Any, x_BTI: mx.array) -> tuple[mx.array, list[mx.array]]:
        group.update(factors)
        ys_BTO = compute(x_BTI, *group.linears)
        weighed = [(y * given(f"c {place}", y.shape, dtype)).sum() for place, y in enumerate(ys_BTO)]
        return sum(weighed, mx.array(0, dtype)), ys_BTO

    run = mx.value_and_grad(weighed, argnums=(0, 1))
    (_, ys_BTO), (gradients, dx_BTI) = (mx.compile(run) if compiled else run)(own, x_BTI)
    group.update(own)  # not what the transformation put in their place
    found = {f"y {place}": y for place, y in enumerate(ys_BTO)} | {"dx": dx_BTI}
    return found | {f"d {name}": gradient for name, gradient in tree_flatten(gradients)}


def numpy(arrays: dict[str, mx.array]) -> Arrays:
    return {n: np.array(a.astype(mx.float32) if a.itemsize < 4 else a) for n, a in arrays.items()}


def oracle(
    group: Group, dtype: mx.Dtype, rounded_to: mx.Dtype | None = None, plain: Compute = one_by_one
) -> Arrays:
    """One by one in this type throughout, of numbers that are first rounded to another."""
    own = group.parameters()
    group.update(tree_map(lambda array: array.astype(rounded_to or array.dtype).astype(dtype), own))
    found = numpy(results(group, plain, dtype))
    group.update(own)
    return found


def hold(what: str, ours: Arrays, expected: Arrays, verdict: Callable[[str], Verdict]) -> None:
    require_same_names(what, ours, expected)
    require(what, [verdict(name) for name in expected])


def as_near(name: str, ours: Arrays, plain: Arrays) -> Verdict:
    """Two float32 results of the same numbers, each with its own rounding."""
    return compare(name, ours[name], plain[name], plain[name].astype(np.float64), LONGEST_SUM)


@pytest.mark.parametrize("name", GROUPS)
def test_in_float64_linears_together_equal_one_by_one(name: str) -> None:
    group = Group(GROUPS[name]).in_type(mx.float64, mx.float64)
    ours, ref64 = numpy(results(group, project, mx.float64)), oracle(group, mx.float64)
    hold(name, ours, ref64, lambda n: within_exact(n, ours[n], ref64[n]))


@eager_and_compiled
def test_in_float32_linears_together_equal_one_by_one_within_rounding(name: str, compiled: bool) -> None:
    group = Group(GROUPS[name])
    ours = numpy(results(group, project, mx.float32, compiled))
    ref32, ref64 = oracle(group, mx.float32), oracle(group, mx.float64)
    hold(name, ours, ref64, lambda n: compare(n, ours[n], ref32[n], ref64[n], LONGEST_SUM))


@eager_and_compiled
def test_in_bfloat16_linears_together_equal_one_by_one_within_rounding(name: str, compiled: bool) -> None:
    """The base bfloat16, the factors float32, gradients of A and B bfloat16 until `vectors.as_vectors`."""
    group = Group(GROUPS[name]).in_type(mx.bfloat16, mx.float32)
    found = results(group, project, mx.bfloat16, compiled)
    for n, array in found.items():
        assert array.dtype == (mx.float32 if "magnitude" in n else mx.bfloat16), n
    ours, ref64 = numpy(found), oracle(group, mx.float64, mx.bfloat16)
    hold(name, ours, ref64, lambda n: within_bfloat16(n, ours[n], ref64[n], LONGEST_SUM))


def up_of(x_BTI: mx.array) -> mx.array:
    return given("up", (I,), x_BTI.dtype) * x_BTI


def of_a_gate(x_BTI: mx.array, linear: nn.Module) -> list[mx.array]:
    return [project_gated(x_BTI, up_of(x_BTI), linear)]


def of_a_gate_plainly(x_BTI: mx.array, linear: nn.Module) -> list[mx.array]:
    return [linear(x_BTI / (1 + mx.power(mx.array(np.e, x_BTI.dtype), -x_BTI)) * up_of(x_BTI))]


GATED = {
    "plain": Part(9),
    "with a bias": Part(9, bias=True),
    "not adapted": Part(9, rank=0),
    "DoRA": Part(9, bias=True, kind=DoRALinear),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", GATED)
def test_in_float64_a_gated_linear_equals_its_composition(name: str, compiled: bool) -> None:
    group = Group([GATED[name]]).in_type(mx.float64, mx.float64)
    ours = numpy(results(group, of_a_gate, mx.float64, compiled))
    ref64 = oracle(group, mx.float64, plain=of_a_gate_plainly)
    hold(name, ours, ref64, lambda n: within_exact(n, ours[n], ref64[n]))


def test_in_bfloat16_a_gated_linear_equals_its_composition_within_rounding() -> None:
    group = Group([GATED["plain"]]).in_type(mx.bfloat16, mx.float32)
    ours = numpy(results(group, of_a_gate, mx.bfloat16))
    ref64 = oracle(group, mx.float64, mx.bfloat16, of_a_gate_plainly)
    hold("gated", ours, ref64, lambda n: within_bfloat16(n, ours[n], ref64[n], LONGEST_SUM))


@pytest.mark.parametrize("name", ["alike", "the middle not adapted"])
def test_a_linear_whose_result_is_not_used_gets_no_gradient(name: str) -> None:
    """And changes no other gradient."""
    group, x_BTI = Group(GROUPS[name]), given("x", (B, T, I), mx.float32)
    own = group.trainable_parameters()

    def last(compute: Compute) -> Arrays:
        def total(factors: Any, x_BTI: mx.array) -> mx.array:
            group.update(factors)
            return compute(x_BTI, *group.linears)[-1].square().sum()

        gradients, dx_BTI = mx.grad(total, argnums=(0, 1))(own, x_BTI)
        group.update(own)
        return numpy({"dx": dx_BTI, **dict(tree_flatten(gradients))})

    ours, plain = last(project), last(one_by_one)
    assert {n for n, a in ours.items() if a.any()} == {"dx", "linears.2.lora_a", "linears.2.lora_b"}
    hold(name, ours, plain, lambda n: as_near(n, ours, plain))


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("places", [(1,), (0, 1, 2)], ids=["in the middle", "everywhere"])
@pytest.mark.parametrize("name", ["alike", "DoRA in the middle", "unequal ranks and scales"])
def test_under_dropout_linears_together_draw_the_masks_of_one_by_one(
    name: str, places: tuple[int, ...], on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So in float64 they are equal; the gradient of the common input is the sum of all."""
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    group = Group(GROUPS[name]).in_type(mx.float64, mx.float64)
    for place in places:
        group.linears[place].dropout.p = 0.5
    assert all(low_rank_of(linear) for linear in group.linears)
    mx.random.seed(1)
    ours = numpy(results(group, project, mx.float64))
    mx.random.seed(1)
    ref64 = numpy(results(group, one_by_one, mx.float64))
    hold(name, ours, ref64, lambda n: within_exact(n, ours[n], ref64[n]))


def test_dora_divides_its_magnitude_in_float32_and_rounds_the_quotient_once() -> None:
    """In bfloat16; a magnitude and a length that were rounded before would be up to two roundings off."""
    layer = DoRALinear(nn.Linear(I, 64, bias=False), 3, 2.0, 0.0)
    layer.linear.set_dtype(mx.bfloat16)
    magnitude_O, length_O = (np.abs(random_array(name, (64,), 1.0)) + 0.5 for name in ("magnitude", "length"))
    layer.magnitude = mx.array(magnitude_O, mx.float32)
    low_rank = low_rank_of(layer) or pytest.fail("an adapter has parts")
    y_1O = low_rank.finish(mx.ones((1, 64), mx.bfloat16), iter([mx.array(length_O, mx.float32)]))
    assert mx.array_equal(y_1O[0], mx.array(magnitude_O / length_O, mx.float32).astype(mx.bfloat16))


@pytest.mark.parametrize("shape", [(3, I), (2, 1, 3, I)])
def test_any_number_of_axes_stands_before_the_input(shape: tuple[int, ...]) -> None:
    group = Group(GROUPS["biases"])
    x = given("x", shape, mx.float32)
    for ours, plain in zip(project(x, *group.linears), one_by_one(x, *group.linears), strict=True):
        assert ours.shape == plain.shape
        require("y", [as_near("y", {"y": np.array(ours)}, {"y": np.array(plain)})])
