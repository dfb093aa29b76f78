"""What `fast/ops.py` computes on a GPU, on a CPU: the same formulas, against NumPy in float64."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl import ops as pattern_ops
from mlx_impl.fast import ops
from mlx_impl.fast.head import head_nats
from mlx_impl.fast.low_rank import LowRank
from mlx_impl.fast.projection import products
from tests.derived import compare, require
from tests.lora_ladder import numpy_ops
from tests.lora_ladder.cases import random_array

pytestmark = pytest.mark.usefixtures("on_the_cpu")

V = 61


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda: True)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_cross_entropy_and_its_gradient_are_numpys(dtype: mx.Dtype, compiled: bool) -> None:
    """In float32 whatever the type of the logits; a masked row may hold NaN."""
    rounded_NV = np.array(mx.array(random_array("logits", (5, V), 3.0)).astype(dtype).astype(mx.float32))
    targets_N, mask_N = np.array([0, 7, V - 1, 3, 3]), np.array([True, True, True, False, True])
    logits_NV = mx.array(np.where(mask_N[:, None], rounded_NV, np.nan)).astype(dtype)
    function = mx.compile(ops.cross_entropy) if compiled else ops.cross_entropy
    ours = function(logits_NV, mx.array(targets_N), mx.array(mask_N))
    single = numpy_ops.cross_entropy(rounded_NV, targets_N, mask_N)
    double = numpy_ops.cross_entropy(rounded_NV.astype(np.float64), targets_N, mask_N)
    assert [one.dtype for one in ours] == [mx.float32, mx.float32]
    require(
        "cross-entropy",
        [
            compare(name, np.array(one), one32, one64, V)
            for name, one, one32, one64 in zip(("nats", "gradient"), ours, single, double, strict=True)
        ],
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_all_heads_share_a_mask_of_numbers_that_changes_no_bit(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the mix and of gradients; where a query sees no key, which is padding, the mix is finite."""
    heads = {"q": 4, "k": 2, "v": 2, "d": 4}
    q, k, v, d = (mx.array(random_array(name, (2, h, 4, 8), 3.0), dtype) for name, h in heads.items())
    mask_B1TS = mx.array(np.random.default_rng(0).random((2, 1, 4, 4)) < 0.6)
    mask_B1TS[0, 0, 1], d[0, :, 1] = False, 0
    expected = mx.vjp(lambda q, k, v: pattern_ops.attention(q, k, v, mask_B1TS), [q, k, v], [d])
    masks: list[mx.array] = []
    attend = pattern_ops.attention

    def noted(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
        masks.append(mask)
        return attend(q, k, v, mask)

    monkeypatch.setattr(pattern_ops, "attention", noted)
    found = mx.vjp(lambda q, k, v: ops.attention(q, k, v, mask_B1TS), [q, k, v], [d])
    assert [(mask.shape, mask.dtype) for mask in masks] == [((2, 1, 4, 4), dtype)]
    least = masks[0].min().item() / mx.finfo(dtype).max
    assert masks[0].max() == 0 and -1 / 1.45 < least < -1 / 4  # log2(e) times it is finite
    (mix,), (expected_mix,) = found[0], expected[0]
    assert mx.isfinite(mix).all()
    mix[0, :, 1] = expected_mix[0, :, 1]
    for ours, theirs in zip([mix, *found[1]], [expected_mix, *expected[1]], strict=True):
        assert mx.array_equal(ours, theirs)


def test_an_unfused_array_is_the_same_to_the_bit() -> None:
    x = mx.array(random_array("x", (7,), 1.0))
    assert mx.array_equal(mx.compile(lambda x: 2 * ops.unfused(3 * x))(x), 2 * (3 * x))


def gradients_of(function: Callable[..., list[mx.array]]) -> Callable[..., list[mx.array]]:
    """The function's values, and the gradients of the sum of each."""

    def values_and_gradients(*arguments: mx.array) -> list[mx.array]:
        ones = [mx.ones(value.shape, value.dtype) for value in function(*arguments)]
        values, gradients = mx.vjp(function, [*arguments], ones)
        return [*values, *gradients]

    return values_and_gradients


def linears(scales: tuple[float, ...]) -> Callable[..., list[mx.array]]:
    parts = [LowRank(zeros(6, 8), None, a_IR=zeros(8, 2), b_RO=zeros(2, 6), scale=scale) for scale in scales]
    return lambda x_NI: products(x_NI, parts)


def head(x_ND: mx.array) -> list[mx.array]:
    weight_VD, targets_N, mask_N = zeros(V, 8), mx.array([0, 1, 2]), mx.array([True, False, True])
    return [head_nats(lambda x: x @ weight_VD.T, V, x_ND, targets_N, mask_N)[0]]


def zeros(*shape: int) -> mx.array:
    return mx.zeros(shape, mx.bfloat16)


Compiled = tuple[Callable[..., list[mx.array]], list[mx.array], set[str]]
COMPILED: dict[str, Compiled] = {  # what a GPU has to compile, by the operations in it
    "linears of one scale": (linears((2.0, 2.0)), [zeros(3, 8)], set()),
    "linears of several scales": (linears((2.0, 1.5)), [zeros(3, 8)], set()),
    "gate": (
        lambda gate, up: [ops.gated(gate, up)],
        [zeros(3, 8), zeros(3, 8)],
        {
            "SigmoidMultiplyMultiply",  # the gate, and the gradient of up
            "MultiplySigmoidMultiplyBroadcastSubtractMultiplyAddMultiply",  # its gradient
        },
    ),
    "head": (head, [zeros(3, 8)], {"BroadcastBroadcastBroadcastEqualAsTypeSubtractBroadcastSelectAsType"}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_gpu_compiles_few_kernels(name: str) -> None:
    """A fused kernel takes 2 to 7 seconds, once on a machine. MLX brings those of single operations."""
    function, arguments, expected = COMPILED[name]
    graph = io.StringIO()
    mx.export_to_dot(graph, *mx.compile(gradients_of(function))(*arguments))
    assert set(re.findall(r'label ?= ?"Compiled(\w+)"', graph.getvalue())) == expected
