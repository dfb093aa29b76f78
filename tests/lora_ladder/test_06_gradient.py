"""Rung 6, gradient: every factor's gradient, by name, against three independent oracles.

The oracles are PyTorch's autograd; central differences, which need no autograd and whose order is tested; and
the adjoint identity <J v, u> = <v, J^T u>, which needs no second trainer. MLX: `mx.value_and_grad` of a model
returns a gradient for every parameter, frozen ones too; `nn.value_and_grad` is the one that respects
`freeze()`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from operator import methodcaller
from typing import Any

import numpy as np
import pytest
import torch

from tests.derived import UNIT_ROUNDOFF, Verdict, judged, within
from tests.lora_ladder.cases import (
    Case,
    cached_for_each_draw,
    common_beginnings,
    every_case,
    named_case,
    one_prompt_batch,
)
from tests.lora_ladder.examples import alone, packed, to_pack
from tests.lora_ladder.judge import Judge

WIDE, NARROW = 2.0**-8, 2.0**-9  # values of h for central differences, whose error is proportional to h^2


@every_case
def test_every_gradient_equals_the_reference(case: Case, judge: Judge) -> None:
    """No tensor is skipped: the names are compared before the numbers."""
    judge(case, lambda trainer: trainer.gradients(case.batch))


@pytest.mark.needs("exact")
@every_case
def test_in_float64_every_gradient_equals_the_reference_to_1e_12(case: Case, judge: Judge) -> None:
    """The algebra is the same, so the difference in float32 was rounding."""
    judge.exactly(case, lambda trainer: trainer.gradients(case.batch))


@every_case
def test_the_gradients_of_rows_with_a_common_prefix_equal_the_reference(case: Case, judge: Judge) -> None:
    """A trainer may compute a common prefix once; its gradient must be the sum over all rows."""
    batch = one_prompt_batch(case.spec.vocab_size)
    judge(case, lambda trainer: trainer.gradients(batch))


def test_the_gradients_of_rows_of_which_some_begin_alike_equal_the_reference(
    case: Case, judge: Judge
) -> None:
    """Two rows or all, with targets in what they have in common."""
    for judge.subject, batch in common_beginnings(case.spec.vocab_size).items():
        judge(case, methodcaller("gradients", batch))


@pytest.mark.parametrize("case", ["untied", "rslora", "patterns"], indirect=True)
def test_the_gradient_of_a_is_exactly_zero_where_b_is_zero(case: Case, candidate: Any) -> None:
    """dA = scale * x^T (G B^T) is zero to the bit where B is zero; dB = scale * (x A)^T G is not."""
    for name, gradient in case.with_zero_b().build(candidate).gradients(case.batch).items():
        assert np.any(gradient) == name.endswith("lora_b"), name


def unit_direction(name: str, case: Case) -> np.ndarray:
    """A random direction for each tensor, so that an error in any element shows."""
    shape = case.factors[name].shape
    d = np.random.default_rng(len(name)).standard_normal(shape)
    return d / np.linalg.norm(d)


@cached_for_each_draw
def slopes(case_name: str, names: tuple[str, ...], trainer: Any, h: float) -> dict[str, float]:
    """(f(w + h d) - f(w - h d)) / 2h of the mean loss f, with one factor moved at a time."""
    case, found = named_case(case_name), {}
    for name in names:
        means = []
        for sign in (1, -1):
            moved = {**case.factors, name: case.factors[name] + sign * h * unit_direction(name, case)}
            nats, num_targets = replace(case, factors=moved).build(trainer).loss(case.batch)
            means.append(nats / num_targets)
        found[name] = (means[0] - means[1]) / (2 * h)
    return found


@pytest.mark.parametrize("case", ["untied", "dora"], indirect=True)
def test_every_gradient_agrees_with_central_differences(case: Case, judge: Judge, candidate: Any) -> None:
    """Halving h divides their error by 4, so it is of order h^2, and extrapolating to h = 0 removes it.

    DoRA's gradient treats the length as a constant, so it is not the slope of the loss with respect to A and
    B. It is the slope with respect to the magnitudes, on which the length does not depend.
    """
    oracle, gradients = judge.oracle(torch.float64), case.build(candidate).gradients(case.batch)
    exact, noise = judge.reference(case, lambda trainer: trainer.gradients(case.batch))
    names = tuple(n for n in exact if n.endswith("magnitude") or not case.lora.use_dora)
    wide, narrow = (slopes(case.name, names, oracle, h) for h in (WIDE, NARROW))
    truths = {name: float(np.sum(exact[name] * unit_direction(name, case))) for name in names}
    # Of all tensors together: the h^2 term of a single one can happen to be almost zero.
    ratio = math.dist(wide.values(), truths.values()) / math.dist(narrow.values(), truths.values())
    assert round(ratio) == 4, f"halving h divides the error by {ratio:.3f}, expected 4"
    verdicts = []
    for name, truth in truths.items():
        at_zero = (4 * narrow[name] - wide[name]) / 3  # Richardson extrapolation removes the h^2 term
        ours = np.array(np.sum(gradients[name] * unit_direction(name, case)))
        rounding = abs(at_zero - truth) + noise[name]  # along a unit direction: at most the tensor's
        source = "the noise and the error of the extrapolation"
        verdicts.append(within(name, ours, np.array(at_zero), rounding, case.longest_sum, source))
    judge.hold(verdicts)


def cotangent(case: Case) -> np.ndarray:
    shape = (*case.batch.inputs_BT.shape, case.spec.vocab_size)
    return np.random.default_rng(23).standard_normal(shape).astype(np.float32)


@pytest.mark.needs("pullback")
@pytest.mark.alone
@every_case
def test_the_pullback_of_a_given_cotangent_equals_the_reference(case: Case, judge: Judge) -> None:
    """The backward pass alone: the gradient of the logits is given, so the loss plays no part."""
    judge(case, lambda trainer: trainer.pullback(case.batch, cotangent(case)))


def adjoint_verdict(case: Case, candidate: Any, unit: float, noise: float) -> Verdict:
    """Compare <J v, u> from six forward passes with <v, J^T u> from one backward pass of the same trainer.

    J v is the Richardson limit of central differences of the logits at h and h / 2. How far it is from the
    limit at 2h and h bounds its truncation error. `noise` is the rounding error of the logits in the
    Frobenius norm; in the limit it becomes at most (8 + 1) / 3h times as large, and in the inner product |u|
    times that.
    """
    h = unit ** (1 / 5)  # balances the truncation error h^4 with the rounding error unit / h
    u_BTV = cotangent(case).astype(np.float64)
    directions = {name: unit_direction(name, case) / np.sqrt(len(case.factors)) for name in case.factors}

    def difference_quotient(h: float) -> float:
        sides = []
        for by in (h, -h):
            moved = {n: w + (by * directions[n]).astype(w.dtype) for n, w in case.factors.items()}
            sides.append(replace(case, factors=moved).build(candidate).logits(case.batch.inputs_BT))
        return float(np.sum((sides[0].astype(np.float64) - sides[1]) / (2 * h) * u_BTV))

    wide, middle, narrow = map(difference_quotient, (2 * h, h, h / 2))
    limit = (4 * narrow - middle) / 3
    truncation = abs(limit - (4 * middle - wide) / 3)
    rounding = noise * float(np.linalg.norm(u_BTV)) * 3 / h
    pulled = case.build(candidate).pullback(case.batch, cotangent(case))
    back = sum(float(np.sum(pulled[n].astype(np.float64) * d)) for n, d in directions.items())
    derivation = f"rounding of the logits {rounding:.3g} + truncation {truncation:.3g}"
    return judged("<J v, u>", np.array(limit), np.array(back), rounding + truncation, derivation)


@pytest.mark.needs("pullback")
@pytest.mark.alone
@pytest.mark.parametrize("case", ["untied", "qk norm", "rslora"], indirect=True)
def test_forward_and_backward_are_adjoint(case: Case, judge: Judge, candidate: Any) -> None:
    """<J v, u> = <v, J^T u>, which needs no second trainer."""
    _, noise = judge.reference(case, lambda trainer: {"logits": trainer.logits(case.batch.inputs_BT)})
    judge.hold([adjoint_verdict(case, candidate, UNIT_ROUNDOFF, noise["logits"])])


@pytest.mark.needs("pullback", "exact")
@pytest.mark.alone
@pytest.mark.parametrize("case", ["untied", "qk norm", "rslora"], indirect=True)
def test_in_float64_forward_and_backward_are_adjoint(case: Case, judge: Judge, candidate: Any) -> None:
    """The same in float64, where rounding hides almost nothing."""
    double = case.in_double()
    logits_BTV = case.build(judge.oracle(torch.float64)).logits(case.batch.inputs_BT)
    noise = np.sqrt(case.longest_sum) * 2.0**-53 * float(np.linalg.norm(logits_BTV))
    with candidate.exact():
        judge.hold([adjoint_verdict(double, candidate, 2.0**-53, noise)])


@pytest.mark.needs("micro_batches")
@pytest.mark.canonical("pad_targets")
@pytest.mark.parametrize("case", ["untied", "sliding window", "llama3 rope", "dora"], indirect=True)
def test_the_gradients_of_packed_rows_are_those_of_their_examples_alone(
    case: Case, candidate: Any, judge: Judge
) -> None:
    """No example reaches into the gradient of another one in its row."""
    for judge.subject, examples in to_pack().items():
        ours = case.build(candidate).gradients(packed(case, candidate, examples))
        judge.given(ours, case, methodcaller("gradients", alone(examples)))
