"""Rung 1, op: the primitives at large sizes, on extreme numbers, and on NaN.

Inputs are finite and so are the results, but a formula that is right for tame numbers overflows: e^x above
88, a mask of -1e4 instead of -inf, a square of 1e20. The noise is that of moved inputs, because the rounding
of a score of 1e5 outweighs everything else. MLX: `mx.fast.rms_norm` forms the cube of 1 / rms for its
gradient, which leaves float32 above 1e13, so its gradient is claimed up to 1e12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.derived import FACTOR, NUM_DRAWS, UNIT_ROUNDOFF, noise_of, within
from tests.lora_ladder import numpy_ops
from tests.lora_ladder.extremes import require_none_finite, unless_refused
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.test_01_op import FREQUENCIES, OPS, Claimed, Op, doubled, normal, rms_norm_op

pytestmark = [pytest.mark.needs("ops"), pytest.mark.alone]

# Of silu's gradient, s (1 + x (1 - s)): 1 - s is off by up to two roundings of s, and is multiplied by x.
# From x = ln 2^25 on, s is 1.
SLOPE_ROUNDING = 2 * np.log(2.0**25) * UNIT_ROUNDOFF


@pytest.fixture
def mx() -> Any:
    return pytest.importorskip("mlx.core")


@pytest.fixture
def ops(candidate: Any) -> Claimed:
    return Claimed(candidate.ops)


def attention_op(
    q_BHTK: np.ndarray, k_BGSK: np.ndarray, v_BGSK: np.ndarray, mask: np.ndarray | None = None
) -> Op:
    return Op(
        lambda ops, q, k, v: ops.attention(q, k, v, None if mask is None else type(q)(mask)),
        lambda q, k, v: numpy_ops.attention(q, k, v, mask),
        lambda q, k, v, g: numpy_ops.attention_pullback(q, k, v, g, mask),
        (q_BHTK, k_BGSK, v_BGSK),
        q_BHTK.shape[1] // k_BGSK.shape[1] * k_BGSK.shape[2],
    )


def attention_of_scores(score_S: np.ndarray, mask: np.ndarray | None = None) -> Op:
    """Every query gives key s about this score: the first number of a head is 1 in q and carries it in k."""
    S, K = len(score_S), 10
    q_BHTK, k_BGSK = normal(2, 6, S, K), normal(2, 2, S, K)
    q_BHTK[..., 0] = 1
    k_BGSK[..., 0] = score_S * np.sqrt(K)
    return attention_op(q_BHTK, k_BGSK, normal(2, 2, S, K), mask)


LATER_IS_HIGHER = np.linspace(-1e5, 1e5, 13, dtype=np.float32)
SAME = np.ones(13, np.float32)
EVERY_OTHER = ((np.arange(13)[:, None] - np.arange(13)) % 2 == 0) & np.tri(13, dtype=bool)


def logits_of(size: float) -> np.ndarray:
    """Rows of large logits: spread out, one for all, one in each direction, and all alike."""
    spread, alike = size * normal(3, 200), np.full((2, 200), size, np.float32) + normal(2, 200)
    one = np.zeros((2, 200), np.float32)
    one[0, 7], one[1, 7] = size, -size
    return np.concatenate([spread, alike, -alike, one]).astype(np.float32)


def logsumexp_op(size: float) -> Op:
    return Op(
        lambda ops, x: ops.logsumexp(x),
        numpy_ops.logsumexp,
        lambda x, g: (numpy_ops.logsumexp_pullback(x, g),),
        (logits_of(size),),
        200,
    )


EXTREMES = {
    "attention to scores of 1e4": attention_of_scores(1e4 * SAME),
    "attention to scores of -1e4": attention_of_scores(-1e4 * SAME),
    "attention to scores of -1e5": attention_of_scores(-1e5 * SAME),
    "attention where later scores are higher": attention_of_scores(LATER_IS_HIGHER),
    "attention where later scores are lower": attention_of_scores(-LATER_IS_HIGHER),
    "attention with a mask where masked scores are higher": attention_of_scores(
        LATER_IS_HIGHER, EVERY_OTHER[None, None]
    ),
    "attention to spread scores": attention_op(
        100 * normal(2, 6, 13, 10), 100 * normal(2, 2, 13, 10), normal(2, 2, 13, 10)
    ),
    "attention over 530 positions": attention_op(
        normal(1, 1, 530, 4), normal(1, 1, 530, 4), normal(1, 1, 530, 4)
    ),
    "attention to a cache of 1100": attention_op(
        normal(1, 2, 3, 4), normal(1, 1, 1100, 4), normal(1, 1, 1100, 4)
    ),
    "attention to a cache of 4200": attention_op(
        normal(1, 2, 2, 4), normal(1, 1, 4200, 4), normal(1, 1, 4200, 4)
    ),
    "logsumexp of 1e4": logsumexp_op(1e4),
    "logsumexp of 1e30": logsumexp_op(1e30),
    "rms_norm of 1e-20": rms_norm_op(1e-20),
    "rms_norm of 1e12": rms_norm_op(1e12),
}


def noise_of_moved(
    call: Callable[..., Arrays], inputs: tuple[np.ndarray, ...], longest_sum: int
) -> tuple[Arrays, dict[str, float]]:
    """The results in float64, and their noise where every input is moved by up to sqrt(k / 2) u of itself."""
    rng, by = np.random.default_rng(1), np.sqrt(longest_sum / 2) * UNIT_ROUNDOFF
    exact = call(*doubled(inputs))
    drawn = [
        call(*(x * (1 + by * rng.uniform(-1, 1, x.shape)) for x in doubled(inputs))) for _ in range(NUM_DRAWS)
    ]
    return exact, noise_of(drawn, exact)


def hold(judge: Judge, ours: Arrays, call: Callable[..., Arrays], inputs: tuple, longest_sum: int) -> None:
    __tracebackhide__ = True
    exact, noise = noise_of_moved(call, inputs, longest_sum)
    judge.hold([within(name, ours[name], exact[name], noise[name], longest_sum) for name in exact])


@pytest.mark.parametrize("name", EXTREMES)
def test_its_value_is_numpys_at_extremes(mx: Any, ops: Any, judge: Judge, name: str) -> None:
    """Large scores, logits and rows; large and small inputs of the norm."""
    op = EXTREMES[name]
    ours = {"value": np.array(op.call(ops, *map(mx.array, op.inputs)))}
    hold(judge, ours, lambda *inputs: {"value": op.value(*inputs)}, op.inputs, op.longest_sum)


@pytest.mark.parametrize("name", EXTREMES)
def test_its_pullback_is_numpys_at_extremes(mx: Any, ops: Any, judge: Judge, name: str) -> None:
    """The gradient of <value, g> with respect to every input, for a random g."""
    op = EXTREMES[name]
    g = normal(*op.value(*op.inputs).shape)

    def named(gradients: Any) -> Arrays:
        return {f"gradient of input {number}": np.array(array) for number, array in enumerate(gradients)}

    _, ours = mx.vjp(lambda *inputs: op.call(ops, *inputs), list(map(mx.array, op.inputs)), [mx.array(g)])
    hold(
        judge,
        named(ours),
        lambda *inputs: named(op.pullback(*inputs, g.astype(np.float64))),
        op.inputs,
        op.longest_sum,
    )


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_cross_entropy_and_its_gradient_are_numpys_at_extremes(
    mx: Any, ops: Any, judge: Judge, size: float
) -> None:
    """Targets that are certain, impossible and among equals; a masked row is 0 whatever it holds."""
    logits_NV = logits_of(size)
    N = len(logits_NV)
    targets_N, mask_N = np.where(np.arange(N) % 2 == 0, 7, 11), np.arange(N) != 1
    ours = ops.cross_entropy(mx.array(logits_NV), mx.array(targets_N), mx.array(mask_N))

    def call(logits_NV: np.ndarray) -> Arrays:
        return dict(
            zip(("nats", "gradient"), numpy_ops.cross_entropy(logits_NV, targets_N, mask_N), strict=True)
        )

    hold(judge, dict(zip(("nats", "gradient"), map(np.array, ours), strict=True)), call, (logits_NV,), 200)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_masked_row_of_nan_costs_nothing(mx: Any, ops: Any, number: float) -> None:
    """No nats and no gradient, to the bit; a product with a mask of 0 would be NaN."""
    logits_NV, targets_N = normal(3, 200), np.array([0, 7, 199])
    logits_NV[1] = number
    nats_N, gradient_NV = (
        np.array(array)
        for array in ops.cross_entropy(
            mx.array(logits_NV), mx.array(targets_N), mx.array(np.array([True, False, True]))
        )
    )
    assert nats_N[1] == 0 and not gradient_NV[1].any()
    assert np.isfinite(nats_N).all() and np.isfinite(gradient_NV).all()


def test_rms_norm_of_huge_numbers_is_numpys(mx: Any, ops: Any, judge: Judge) -> None:
    """At 1e15 the squares are 1e30, which float32 still holds."""
    op = rms_norm_op(1e15)
    ours = {"value": np.array(op.call(ops, *map(mx.array, op.inputs)))}
    hold(judge, ours, lambda *inputs: {"value": op.value(*inputs)}, op.inputs, 48)


@pytest.mark.parametrize("position", [511, 4095, 100_000])
def test_rope_far_from_the_start_is_numpys(mx: Any, ops: Any, judge: Judge, position: int) -> None:
    """Four tokens from there on, given by the first one's position; the angle's rounding is the noise."""
    x_BHTK = normal(1, 2, 4, 10)
    ours = {"value": np.array(ops.rope(mx.array(x_BHTK), FREQUENCIES, position))}

    def call(x_BHTK: np.ndarray, frequency_P: np.ndarray) -> Arrays:
        return {"value": numpy_ops.rope(x_BHTK, tuple(frequency_P), position)}

    hold(judge, ours, call, (x_BHTK, np.array(FREQUENCIES)), 4)


def test_the_gradients_of_the_gate_are_right_far_out(mx: Any, ops: Any) -> None:
    """Element by element up to |x| = 1000: that of gate is at most 1.1, that of up is silu."""
    x = np.linspace(-1000, 1000, 8001).astype(np.float32)
    ones = np.ones(x.shape)
    with np.errstate(over="ignore"):  # e^1000 is infinite in float64 too, and its inverse rightly 0
        of_gate, of_up = numpy_ops.gated_pullback(x.astype(np.float64), ones, ones)
    _, ours = mx.vjp(ops.gated, [mx.array(x), mx.ones(x.shape)], [mx.ones(x.shape)])
    assert np.abs(np.array(ours[0]) - of_gate).max() <= SLOPE_ROUNDING
    error = np.abs(np.array(ours[1]) - of_up)
    assert (error <= FACTOR * 40 * UNIT_ROUNDOFF * np.abs(of_up))[x >= -40].all()
    assert error[x < -40].max() <= 40 * np.exp(-40)  # all that silu itself is there


def test_silu_and_its_gradient_are_right_far_out(mx: Any, ops: Any) -> None:
    """Element by element up to |x| = 1000, where e^-x has long overflowed."""
    x = np.linspace(-1000, 1000, 8001).astype(np.float32)
    with np.errstate(over="ignore"):
        value = numpy_ops.silu(x.astype(np.float64))
        slope = numpy_ops.silu_pullback(x.astype(np.float64), np.ones(x.shape))
    (ours,), (gradient,) = mx.vjp(ops.silu, [mx.array(x)], [mx.ones(x.shape)])
    assert np.abs(np.array(gradient) - slope).max() <= SLOPE_ROUNDING
    error = np.abs(np.array(ours) - value)
    assert (error <= FACTOR * 40 * UNIT_ROUNDOFF * np.abs(value))[x >= -40].all()
    assert error[x < -40].max() <= 40 * np.exp(-40)  # all that silu itself is there


# Not those with a mask: whether 0 times a masked NaN is NaN is left open.
SPOILED = [
    (name, number)
    for name in ("rms_norm", "rope", "attention", "attention to a cache", "silu", "gated", "logsumexp")
    for number in range(len(OPS[name].inputs))
]


@pytest.mark.parametrize(("name", "number"), SPOILED)
def test_a_nan_in_an_input_reaches_value_and_gradient(
    mx: Any, ops: Any, judge: Judge, name: str, number: int
) -> None:
    """Its first number is NaN, which in attention every query sees; where NumPy's result is NaN, ours is."""
    op = OPS[name]
    inputs = [x.copy() for x in op.inputs]
    inputs[number].flat[0] = np.nan
    g = np.ones(op.value(*op.inputs).shape, np.float32)

    def results() -> Arrays:
        given = list(map(mx.array, inputs))
        (value,), gradients = mx.vjp(lambda *x: op.call(ops, *x), given, [mx.array(g)])
        return {"value": np.array(value), "gradient": np.array(gradients[number])}

    double = doubled((*inputs, g))
    expected = {"value": op.value(*double[:-1]), "gradient": op.pullback(*double)[number]}
    ours = unless_refused(results)
    if ours is not None:
        is_lost = {name: np.isnan(array) for name, array in expected.items()}
        judge.report(lambda: require_none_finite("a NaN", ours, is_lost))


@pytest.mark.parametrize(("name", "number"), SPOILED)
def test_a_nan_in_the_cotangent_reaches_the_gradient(
    mx: Any, ops: Any, judge: Judge, name: str, number: int
) -> None:
    """The gradient of the first output is NaN; so is every gradient that NumPy forms of it."""
    op = OPS[name]
    g = np.ones(op.value(*op.inputs).shape, np.float32)
    g.flat[0] = np.nan
    _, gradients = mx.vjp(lambda *x: op.call(ops, *x), list(map(mx.array, op.inputs)), [mx.array(g)])
    expected = op.pullback(*doubled((*op.inputs, g)))[number]
    if name.startswith("attention"):  # at the first key, which the first query sees
        expected = np.where(np.arange(expected.shape[2])[:, None] == 0, expected, 0)
    lost = {"gradient": np.isnan(expected)}
    judge.report(lambda: require_none_finite("a NaN", {"gradient": np.array(gradients[number])}, lost))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_nan_at_a_target_reaches_cross_entropy(mx: Any, ops: Any, judge: Judge, number: float) -> None:
    """Nats and gradient of its row; those of the other rows are as without it."""
    logits_NV, targets_N, mask_N = normal(3, 200), np.array([0, 7, 199]), np.ones(3, bool)
    logits_NV[1, 50] = number
    nats_N, gradient_NV = map(
        np.array, ops.cross_entropy(mx.array(logits_NV), mx.array(targets_N), mx.array(mask_N))
    )
    is_lost = {"nats": np.arange(3) == 1, "gradient": (np.arange(3) == 1) & True}
    ours = {"nats": nats_N, "gradient": gradient_NV.sum(axis=-1)}
    judge.report(lambda: require_none_finite("a NaN or an infinity", ours, is_lost))
    assert np.isfinite(nats_N[[0, 2]]).all() and np.isfinite(gradient_NV[[0, 2]]).all()
