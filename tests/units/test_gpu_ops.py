"""What `fast/ops.py` computes on a GPU, on a CPU: the same formulas, against NumPy in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl.fast import ops
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


def test_an_unfused_array_is_the_same_to_the_bit() -> None:
    x = mx.array(random_array("x", (7,), 1.0))
    assert mx.array_equal(mx.compile(lambda x: 2 * ops.unfused(3 * x))(x), 2 * (3 * x))
